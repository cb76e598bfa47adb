"""One run of a diffusers pipeline, or of a sibling of it, under a cache: its call, its callbacks turned into steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .guidance import WITHOUT_TEXT

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from cache import CacheReport

    from .acceleration.attention import Attention
    from .acceleration.compilation import Compilation
    from .guidance import Guidance

Kind = Literal["Img2Img", "Inpaint"]


def sibling_of(pipeline: Any, kind: Kind) -> Any:
    """diffusers' pipeline of that kind, made of the components of `pipeline`; FluxFillPipeline inpaints itself."""
    import diffusers

    # By name: diffusers' AutoPipelineForImage2Image would import every pipeline that there is.
    own = type(pipeline)
    cls = getattr(diffusers, own.__name__.replace("Img2Img", "").replace("Pipeline", f"{kind}Pipeline"), own)
    settings = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(cls.__init__).parameters
    parts = {name: value for name, value in settings.items() if name in wanted}
    # StableDiffusionImg2ImgPipeline compares a UNet's sample_size with 64; that of oblong pictures is a list.
    sibling = cls(**{name: None if name == "unet" else value for name, value in parts.items()})
    sibling.register_modules(**{name: value for name, value in parts.items() if name == "unet"})
    sibling.set_progress_bar_config(disable=True)
    return sibling


@dataclass(frozen=True, slots=True)
class Begun:
    """Latents after `steps` of `whole`, made by another model on the schedule of its saved `scheduler`."""

    latents: Tensor
    steps: int
    whole: int
    scheduler: Any

    def followed(self, own: Any) -> Any:
        """That scheduler, for a network which predicts what its `own` saved one says."""
        predicts = own.config.prediction_type
        return type(self.scheduler).from_config(self.scheduler.config, prediction_type=predicts)


@dataclass(slots=True, kw_only=True)
class Run:
    """What a run is made of, and how many of its `steps` are done.

    sampling: sampler and scheduler by name. grid: height and width of the latents. settings: arguments of the
    pipeline's call; texts: makes those for the text. ignored: the names of those that it would not read.
    part: its steps among the `whole` number of those that the drawing of the picture takes, which two models may share.
    """

    pipeline: Any
    scheduler: Any
    sampling: tuple[str, str]
    report: CacheReport
    attention: Attention
    compilation: Compilation
    guidance: Guidance
    part: range
    whole: int
    texts: Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
    grid: tuple[int, int]
    settings: Mapping[str, Any]
    ignored: Sequence[str]
    done: int = 0

    @property
    def steps(self) -> int:
        return len(self.part)

    @property
    def share(self) -> float:
        """Of the whole drawing, how much is done before the present step."""
        return (self.part.start + self.done) / self.whole

    def __call__(
        self, conditioning: Mapping[str, Tensor], generators: Sequence[Generator], on_step: Callable[[], None]
    ) -> Tensor:
        """Latents as the pipeline returns them, one row for each of `generators`."""

        def callback(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            # The rule of the pipelines' own progress bar: PNDM's extra first call and the two calls of second-order
            # samplers, whose last step has but one, come out as `steps` steps.
            order, calls = self.scheduler.order, pipeline.num_timesteps
            warm_up = calls - (self.whole - self.part.start) * order
            if index == calls - 1 or (index + 1 > warm_up and (index + 1) % order == 0):
                self.done += 1
                on_step()
            if self.part.start + self.done == self.part.stop < self.whole:
                pipeline._interrupt = True  # diffusers' own way to leave out the other timesteps
            return tensors

        latents: Tensor = self.pipeline(
            **self.texts(conditioning),
            **self.settings,
            generator=list(generators),
            output_type="latent",
            callback_on_step_end=callback,
        ).images
        return latents


class Laned:
    """A run's transformer to a pipeline that calls it with text, then without, which not all of diffusers' say.

    A cache would hold what was kept of the one against the other.
    """

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._text: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        text = inputs["encoder_hidden_states"]
        self._text = text if self._text is None else self._text
        lane = getattr(self._transformer, "cache_context", nullcontext)  # a cache brings one
        with lane("cond" if text is self._text else WITHOUT_TEXT):
            return self._transformer(*args, **inputs)
