"""What a cache refuses. The message carries the remedy."""

from __future__ import annotations


class CacheError(Exception):
    """A cache cannot act as asked."""


class AlreadyAttached(CacheError):
    """The denoiser is inside another `attach`."""


class IncompatibleDenoiser(CacheError):
    """The strategy does not work on a denoiser of this kind, or its structure is not one that the views know."""
