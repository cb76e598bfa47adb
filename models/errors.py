"""What goes wrong with a model, in sentences for whoever asked."""

from __future__ import annotations

from typing import ClassVar


class ModelError(Exception):
    """A model could not be found, loaded or run as asked. The message carries the remedy.

    `field`: the request's field at fault, where it is one.
    """

    field: ClassVar[str | None] = None


class UnknownModel(ModelError):
    """No model of that name is configured."""


class LoadFailed(ModelError):
    """The model's files are missing, corrupt or of another family."""


class RefinerFailed(LoadFailed):
    """A refiner's files do not load, or there is no room for it beside the model."""

    field = "refiner_model"


class UnsupportedSampler(ModelError):
    """The model has no such sampler, or that sampler cannot be paired with that scheduler."""


class TooFewSteps(ModelError):
    """A stage would have no step to run."""

    field = "steps"


class NeedsPicture(ModelError):
    """The model draws over pictures alone."""

    field = "model"


class DrawsFromNoise(ModelError):
    """The model draws over no picture."""

    field = "model"


class AdapterFailed(ModelError):
    """A LoRA or an embedding is broken or was made for another model."""


class DetectorFailed(ModelError):
    """The operator's file of a face detector is broken or of another kind."""

    field = "adetailer"


class UpscalerFailed(ModelError):
    """An upscaler's file is broken or of another kind, or its pictures would be too large."""


class GenerationCancelled(Exception):
    """Raised by a step hook to stop a run at a step boundary; passes through `generate` untouched."""
