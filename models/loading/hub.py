"""Files of the Hugging Face hub: fetched once, cached, and each way to fail told with its remedy."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.base import Hub, ModelSpec
from models.errors import LoadFailed

TELL_SECONDS = 15.0  # between two words on how far a download has come


def fetch_file(spec: ModelSpec, hub: Hub, path: str) -> Path:
    """One small file of the repository, from the cache where it is there. Raises LoadFailed."""
    from huggingface_hub import hf_hub_download

    with _explained(spec, hub):
        return Path(hf_hub_download(hub.repository, path, revision=hub.revision))


def fetch_pipeline(spec: ModelSpec, hub: Hub, pipeline_class: Any, on_stage: Callable[[str], None]) -> Path:
    """The folder of what `pipeline_class` loads of the repository: safetensors weights, no code.

    `on_stage` hears now and then, from another thread, how much there is; nothing while nothing comes. Raises
    LoadFailed.
    """
    on_stage("fetching from the hub")
    with _explained(spec, hub), _told(hub, on_stage):
        folder = pipeline_class.download(
            hub.repository,
            revision=hub.revision,
            variant=hub.variant,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return Path(folder)


@contextmanager
def _told(hub: Hub, on_stage: Callable[[str], None]) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub.repository, repo_type="model") / "blobs"
    ended = threading.Event()
    before = _bytes_in(folder)

    def watch() -> None:
        nonlocal before
        while not ended.wait(TELL_SECONDS):
            if (now := _bytes_in(folder)) != before:
                on_stage(f"fetching from the hub, {now / 2**30:.2f} GiB so far")
                before = now

    watcher = threading.Thread(target=watch, name="hub-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue  # renamed when it was complete
    return total


@contextmanager
def _explained(spec: ModelSpec, hub: Hub) -> Iterator[None]:
    try:
        yield
    except LoadFailed:
        raise
    except Exception as error:  # the hub's client raises its own, those of its HTTP library, and OSError around them
        raise LoadFailed(f"The model {spec.name!r} could not be fetched from {hub}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """A sentence on the first error of the chain of causes that says what to do, else on the error itself."""
    from huggingface_hub import constants, errors

    each: BaseException | None = error
    while each is not None:
        match each:
            case errors.GatedRepoError():
                return "it is gated. Accept its licence on its page at the hub and set HF_TOKEN to your access token."
            case errors.RepositoryNotFoundError():
                return "there is no such repository, or it is private. Check `hub`, or set HF_TOKEN to an access token."
            case errors.RevisionNotFoundError():
                return "there is no such revision. Check `revision`."
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
                return (
                    "the hub cannot be reached and its files are not in the cache. Connect once, or give the model's "
                    "`folder` instead."
                )
            case errors.EntryNotFoundError():
                return "it lacks a file that a diffusers pipeline has. Name a repository in diffusers format."
            case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
                return "the hub refused access. Set HF_TOKEN to an access token that may read it."
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return (
                    f"there is no space left for it in the hub's cache, {constants.HF_HUB_CACHE}. Free some, or let "
                    "HF_HOME name a folder on another disk; what has come is used again."
                )
        each = each.__cause__ or each.__context__
    said = str(error).strip().splitlines()
    return f"{said[0] if said else type(error).__name__}"
