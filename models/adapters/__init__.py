"""What a request adds to a loaded model: LoRAs and textual inversions, in place while it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from models.base import GenerationParams

from . import embedding, lora


@contextmanager
def applied(pipeline: Any, params: GenerationParams) -> Iterator[Callable[[GenerationParams], GenerationParams]]:
    """`pipeline` with the adapters of `params`; afterwards, on success, error and cancel, exactly as it was.

    Yields a function for each request with these adapters: its prompts, each embedding's name written as the tokens
    that stand for it. Raises AdapterFailed.
    """
    with lora.applied(pipeline, params.loras), embedding.inserted(pipeline, params.embeddings) as read:

        def written(request: GenerationParams) -> GenerationParams:
            return replace(request, prompt=read(request.prompt), negative_prompt=read(request.negative_prompt))

        yield written
