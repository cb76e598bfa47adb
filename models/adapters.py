"""What a request adds to a loaded model: LoRAs and textual inversions, in place while it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from . import embedding, lora
from .base import GenerationParams


@contextmanager
def applied(pipeline: Any, params: GenerationParams) -> Iterator[GenerationParams]:
    """`pipeline` with the adapters of `params`; afterwards, on success, error and cancel, exactly as it was.

    Yields the parameters to encode text from: an embedding's name is replaced by its tokens. Raises AdapterFailed.
    """
    with lora.applied(pipeline, params.loras), embedding.inserted(pipeline, params.embeddings) as written:
        yield replace(params, prompt=written(params.prompt), negative_prompt=written(params.negative_prompt))
