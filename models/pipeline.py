"""A loaded diffusers pipeline: what all families share. It knows nothing of requests' stages."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from cache import FittedForecast

from . import finite, masks
from .acceleration import attention, compilation
from .base import UNWATCHED, Control, GenerationParams, LoadHooks, ModelSpec
from .decoding import Decoding
from .errors import LoadFailed
from .guidance import Guidance
from .loading.plan import Plan, Work, choose
from .run import Begun, Kind, Laned, Run, sibling_of
from .sampling import samplers
from .sampling.responses import Responses

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from cache import CacheStrategy, Denoiser
    from cache.patching import Shadow
    from cache.prediction import Prediction

    from .control import ControlNets, Steering
    from .loading.residence import Residence


class PipelineModel(Decoding):
    """diffusers' own loops do the denoising. Neither a scheduler nor a random generator outlives a run.

    longest_read: tokens of a text that an encoder reads at most, be they all taken or not.
    """

    longest_read = 512

    def __init__(
        self, spec: ModelSpec, pipeline: Any, denoiser: Denoiser, choices: Mapping[str, samplers.Sampler]
    ) -> None:
        self.spec = spec
        self.pipeline = pipeline
        self.denoiser = denoiser
        self.choices = choices
        self.compile_backend = "inductor"
        self.memory: int | None = None
        self.residence: Residence | None = None
        self._compiled: compilation.CompiledLayers | None = None
        self.responses = Responses()

    def work(self, width: int, height: int, images: int, *, guided: bool = True) -> Work:
        """What so many images need beside the weights, for a plan. guided: at a guidance scale above 1."""
        from .memory import work

        return work(self, width, height, images, guided=guided)

    def settle(self, device: str, memory: int | None = None, hooks: LoadHooks = UNWATCHED) -> None:
        """Put the networks where they compute, or where they wait. Raises LoadFailed.

        memory: bytes of the device that a plan may count on. None: all are put there, or the least of each, if the
        spec's `offload` says so.
        """
        pipeline, spec = self.pipeline, self.spec
        if device == "cpu" or spec.offload == "sequential":
            hooks.stage(f"moving to {device}")
            if device == "cpu" and spec.offload not in (None, "none"):
                raise LoadFailed(
                    f"The model {spec.name!r} is to be offloaded to main memory, and on the CPU it lies there already. "
                    "Remove `offload` from the models file."
                )
            if device == "cpu":
                pipeline.to(device)
            else:
                pipeline.enable_sequential_cpu_offload(device=device)
            return
        import torch

        from .loading.residence import Residence

        networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        self.residence, self.memory = Residence(networks, torch.device(device)), memory
        plan = self.planned(self.residence, self.usual_work)
        hooks.room(plan.need(self.residence.sizes, Work(text=0, denoise=0, decode=0, tiled=0)))
        hooks.stage(f"moving to {device}. {plan.words(self.residence.sizes)}")
        self.residence.settle(plan)

    def planned(self, residence: Residence, work: Work) -> Plan:
        """For those networks at that work, in this model's memory."""
        if self.memory is None and self.spec.offload is None:
            return Plan(offload="none")
        return choose(residence.sizes, work, self.memory or 0, self.spec.offload)

    @property
    def usual_work(self) -> Work:
        """For one picture at the model's own size."""
        side = round(self.native_pixels**0.5)
        width, height = self.spec.render_sizes[0] if self.spec.render_sizes else (side, side)
        return self.work(width, height, 1)

    def plan_row(self) -> dict[str, Any] | None:
        """Where the networks lie, ready for JSON; None where nothing was planned."""
        if self.residence is None or self.memory is None:
            return None
        return self.residence.plan.row(self.residence.sizes, self.usual_work, self.memory)

    @cached_property
    def controlnets(self) -> ControlNets:
        from .control import ControlNets

        return ControlNets(self.denoiser.root, self.pipeline.vae.dtype, self.device)

    def steering(self, control: Sequence[Control], params: GenerationParams) -> Steering:
        """Those ready ControlNets for one run, in a family that has any."""
        raise NotImplementedError

    @contextmanager
    def run(
        self,
        params: GenerationParams,
        seeds: tuple[int, ...],
        strategy: CacheStrategy,
        size: tuple[int, int],
        pictures: Sequence[Image.Image] = (),
        strength: float = 1.0,
        until: float = 1.0,
        begun: Begun | None = None,
        mask: Image.Image | None = None,
        control: tuple[Control, ...] = (),
    ) -> Iterator[Run]:
        """Within the context, latents of `size` (width, height) can be denoised, one for each of `seeds`.

        They begin in noise, or where the last `strength` of the schedule begins for `pictures` of that size, as in
        diffusers' img2img or, within a mask, inpaint pipelines, or as they were `begun`; they end with the steps that
        begin before `until` of the schedule is over. A checkpoint for inpainting has all masked without a mask.
        control: ready ones, with what of their pictures lies under it. Raises AttentionUnavailable, CompilationFailed.
        """
        if self.inpaints and mask is None:
            mask, pictures = masks.everything(size), pictures or [masks.nothing(size)] * len(seeds)
        pipeline = self.sibling("Img2Img" if mask is None else "Inpaint") if pictures or begun else self.pipeline
        takes = inspect.signature(type(pipeline).__call__).parameters
        wanted: dict[str, Any] = {"width": size[0], "height": size[1], "num_inference_steps": params.steps}
        timesteps = samplers.custom_timesteps(params.scheduler, params.steps, self.published_timesteps)
        wanted |= self.guidance(params) | ({} if timesteps is None else {"timesteps": timesteps})
        whole, part = self.partial_steps(params.steps, strength), range(self.steps_before(params, strength, until))
        if pictures:
            wanted |= {"image": list(pictures), "strength": strength}
        elif begun is not None:
            whole, part = begun.whole, range(begun.steps, begun.whole)
            wanted |= {"image": begun.latents, "latents": begun.latents}
        wanted |= {} if mask is None else {"mask_image": masks.cells(mask, size, pipeline.vae_scale_factor)}
        dtype = str(self.denoiser.root.dtype).removeprefix("torch.")
        with (
            self._scheduled(pipeline, params, seeds, begun) as scheduler,
            self._compiling(params) as compiling,
            attention.attending(params.attention, str(self.device), dtype) as kernel,
        ):
            if begun is not None or (pictures and timesteps is not None):
                calls = params.steps if timesteps is None else scheduler.order * (params.steps - 1) + 1
                skipped = params.steps - whole + part.start
                wanted["strength"] = min(1.0, (calls - skipped + 0.5) / calls)  # cut to steps; of a list, to its calls
            sampling = samplers.names(scheduler, self.choices, params.sampler, params.scheduler)
            guidance = Guidance.of(params, part.start / whole, part.stop / whole, twice=self.runs_twice(params))
            view = self.view(scheduler, sampling, guidance).sampled(partial(self.responses, scheduler))
            steering = self.steering(control, params) if control else None
            plain = not pictures and begun is None and params.multiscale is None and guidance.is_whole
            if isinstance(strategy, FittedForecast) and not (plain and len(part) == params.steps):
                strategy = strategy.otherwise
            with strategy.attach(view.injecting(steering)) as report:
                run = Run(
                    pipeline=pipeline,
                    scheduler=scheduler,
                    sampling=sampling,
                    report=report,
                    attention=kernel,
                    compilation=compiling,
                    guidance=guidance,
                    steering=steering,
                    part=part,
                    whole=whole,
                    texts=self.texts,
                    grid=(size[1] // pipeline.vae_scale_factor, size[0] // pipeline.vae_scale_factor),
                    settings={name: value for name, value in wanted.items() if name in takes},
                    ignored=sorted(wanted.keys() - takes.keys() - {"width", "height"}),  # else the pictures' own
                )
                with guidance.attached(lambda: run.share, self.denoiser.root, self.layout):
                    yield run

    def _compiling(self, params: GenerationParams) -> AbstractContextManager[compilation.Compilation]:
        """The denoiser with its layers compiled, if `params` ask for it."""
        if not params.compiled:
            return nullcontext(compilation.Compilation())
        if self.residence is not None and self.residence.plan.kept:
            raise compilation.CompilationFailed(
                "stable_fast cannot compile a model whose blocks are streamed, for want of memory. Leave it out."
            )
        if self._compiled is None:
            self._compiled = compilation.CompiledLayers(self.denoiser, self.compile_backend)
        return self._compiled.attached()

    def view(self, scheduler: Any, sampling: tuple[str, str], guidance: Guidance) -> Denoiser:
        """The denoiser as a strategy sees it in one run. sampling: the run's sampler and scheduler by name."""
        return self.denoiser

    def shadows(self) -> Sequence[Shadow]:
        """What else stands in for parts of the denoiser while it runs."""
        return ()

    def prediction(self, scheduler: Any) -> Prediction:
        """What the denoiser takes and answers in a run of that scheduler."""
        from cache.prediction import prediction_of

        return prediction_of(scheduler)

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser takes a mask and the masked picture beside the latents."""
        root: Any = self.denoiser.root
        return root.config.in_channels in masks.INPAINTING

    def sibling(self, kind: Kind) -> Any:
        """diffusers' pipeline of that kind for this one, made of the same components."""
        return sibling_of(self.pipeline, kind)

    def partial_steps(self, steps: int, strength: float) -> int:
        """How many of `steps` that pipeline takes at `strength`."""
        return min(int(steps * strength), steps)

    def steps_before(self, params: GenerationParams, strength: float, until: float) -> int:
        """How many of those begin before `until` of the schedule is over."""
        left_out = params.steps - self.partial_steps(params.steps, strength)
        before = params.steps
        if until < 1:
            saved = self.pipeline.scheduler
            before = samplers.steps_before(saved, self.choices, params, self.published_timesteps, until)
        return max(0, before - left_out)

    @property
    def published_timesteps(self) -> Sequence[int]:
        """Ten training timesteps for the scheduler `ays`."""
        return samplers.AYS_TIMESTEPS

    @property
    def size_multiple(self) -> int:
        """Pixels that a drawing's sides are multiples of."""
        return int(self.pipeline.vae_scale_factor * self.layout.multiple)

    @property
    def native_pixels(self) -> int:
        """Of the pictures that the network was trained on."""
        sample = getattr(self.denoiser.root.config, "sample_size", None) or self.pipeline.default_sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return int(height * width * self.pipeline.vae_scale_factor**2)

    @contextmanager
    def _scheduled(
        self, pipeline: Any, params: GenerationParams, seeds: tuple[int, ...], begun: Begun | None
    ) -> Iterator[Any]:
        """`pipeline` with a scheduler of one run's own, which is yielded; the saved one is back afterwards.

        What another model has begun is gone on with on its schedule; what the network predicts is its own. The denoiser
        may be called with tensors on the CPU, as that scheduler's timesteps are.
        """
        from cache.patching import shadowed
        from cache.transfer import uploading

        saved, root = pipeline.scheduler, self.denoiser.root
        shadows = [(root, "forward", uploading(root.forward, self.device)), *self.shadows()]
        if self.rows(guided=True) == 1:
            shadows.append((pipeline, "transformer", Laned(root)))
        followed = saved if begun is None else begun.followed(saved)
        pipeline.scheduler = samplers.build(
            followed, self.choices, params.sampler, params.scheduler, steps=params.steps, seeds=seeds
        )
        try:
            with shadowed(shadows):
                yield pipeline.scheduler
        finally:
            pipeline.scheduler = saved

    @abstractmethod
    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        """A denoiser's arguments for one row at that grid of latents, on the meta device."""

    @abstractmethod
    def rows(self, *, guided: bool) -> int:
        """Rows of a denoiser's batch that an image takes."""

    @property
    @abstractmethod
    def kept_cells(self) -> int:
        """Numbers that a cache holds at most, for each row and each of the latents' cells."""

    def encode(self, params: GenerationParams) -> dict[str, torch.Tensor]:
        """The text as the denoiser is to have it, by name, each with one row (1, …). Raises NotFinite."""
        try:
            encoded = {name: rows for name, rows in self._encode(params).items() if rows is not None}
        finally:
            if self.residence is not None:
                self.residence.send_away(self.residence.sizes.texts)
        readers = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        finite.check(encoded.values(), "The encoded text is", self.pipeline, readers)
        return encoded

    @abstractmethod
    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]: ...

    def texts(self, rows: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """The pipeline's arguments for the text of a batch, of what `encode` made, a row an image."""
        return rows

    @abstractmethod
    def runs_twice(self, params: GenerationParams) -> bool:
        """Whether the pipeline runs the denoiser with text and without."""

    @abstractmethod
    def guidance(self, params: GenerationParams) -> dict[str, float]:
        """The pipeline's arguments for guidance."""

    @abstractmethod
    def warnings(self, params: GenerationParams) -> list[str]:
        """What of the request this family cannot honour."""
