"""The command `threshold`: uncached pictures with a progress bar, then the threshold that a wished speed-up needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.api.resolve import Limits, resolve
from app.api.schemas import parse
from app.errors import ServiceError
from app.progress import bar
from app.settings import Settings
from cache import FirstBlockCache
from models import threshold
from models.base import Step

if TYPE_CHECKING:
    from cache.threshold import Found


def found_for(
    speedup: float,
    given: dict[str, Any],
    settings: Settings,
    prompts: Sequence[str] | None = None,
) -> Found:
    """`given`: the fields of a request but its prompt; one picture of each of `prompts` is drawn.

    Raises ServiceError and ModelError, which say what to ask instead.
    """
    from app.engine.configured import runner_here

    prompts = prompts or threshold.PROMPTS
    request = parse({"prompt": prompts[0], **given})
    with bar("starting") as progress:
        runner = runner_here(settings)
        job = resolve(request, runner.catalogue(), Limits.of(settings), "command-line", request.output_format)
        if not isinstance(job.strategy, FirstBlockCache):
            raise ServiceError(f"{job.model} has no first-block cache, so that there is no threshold to find.")
        runner.watch_loading(progress.loading)
        model = runner.model(job.model)
        progress.show(job.model, total=job.params.steps * len(prompts), completed=0)

        def on_step(step: Step) -> None:
            progress.advance()

        return threshold.find(model, job.params, speedup, job.strategy, on_step, prompts)
