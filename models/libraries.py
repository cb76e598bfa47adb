"""What diffusers and transformers say: kept off stderr, or made a sentence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Said on every run, and nothing a user can act on: numpy about how torch hands it tensors, torchsde about a time that
# rounding put 1e-7 before the interval's start, diffusers about a class of its own that Chroma is made of.
NOISE: tuple[tuple[str, type[Warning]], ...] = (
    ("__array__ implementation doesn't accept a copy keyword", DeprecationWarning),
    ("__array_wrap__ must accept context and return_scalar", DeprecationWarning),
    (r"Should have t[ab][<>]=t[01] but got", UserWarning),
    ("`FluxPosEmbed` is deprecated", FutureWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of diffusers and transformers off stderr inside the block.

    Also what libraries say to whoever runs certain of diffusers' schedulers and networks: see NOISE.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.CRITICAL)
            library.disable_progress_bar()
        with warnings.catch_warnings():
            for message, category in NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What the error says first, as a sentence."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."
