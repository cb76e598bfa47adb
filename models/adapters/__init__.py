"""What a request adds to a loaded model: LoRAs and textual inversions, in place while it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from models.base import GenerationParams

from . import embedding, lora


@dataclass(frozen=True, slots=True)
class Applied:
    """Adapters in place. `warnings`: sentences on what of them was left out."""

    read: Callable[[str], str]
    warnings: list[str]

    def written(self, request: GenerationParams) -> GenerationParams:
        """A request with these adapters: in its prompts each embedding's name is the tokens that stand for it."""
        return replace(request, prompt=self.read(request.prompt), negative_prompt=self.read(request.negative_prompt))


@contextmanager
def applied(pipeline: Any, params: GenerationParams) -> Iterator[Applied]:
    """`pipeline` with the adapters of `params`; afterwards, on success, error and cancel, exactly as it was.

    Raises AdapterFailed.
    """
    files = [lora.read(one) for one in params.loras if one.weight or one.text_weight]
    bundled, said = embedding.bundled(pipeline, files)
    with (
        lora.applied(pipeline, files) as left_out,
        embedding.inserted(pipeline, params.embeddings, bundled) as read,
    ):
        yield Applied(read, [*left_out, *said])
