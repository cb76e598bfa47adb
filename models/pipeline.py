"""A loaded diffusers pipeline that draws pictures under a cache strategy: what all families share."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial, wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from . import adapters, attention, compilation, embedding, finite, limits, samplers
from .base import Generation, GenerationParams, ModelSpec, Step, StepHook, StepsHook
from .loading import quiet
from .share import Share, alike, joined
from .texts import TextCache, key_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from cache import CacheStrategy, Denoiser

    from .layout import Layout
    from .passes import Pass
    from .passes.drawing import Progress
    from .passes.preview import Decoder

Written = Callable[[GenerationParams], GenerationParams]  # see `adapters.applied`
REMEMBERED = 64  # samplers' responses: a few numbers each


class PipelineModel(ABC):
    """Encode the prompt, then take each batch through the passes (`models/passes`).

    diffusers' own loops do the denoising. Neither a scheduler nor a random generator outlives a batch.
    """

    def __init__(
        self, spec: ModelSpec, pipeline: Any, denoiser: Denoiser, choices: Mapping[str, samplers.Sampler]
    ) -> None:
        self.spec = spec
        self.pipeline = pipeline
        self.choices = choices
        self.compile_backend = "inductor"
        self._denoiser = denoiser
        self._compiled: compilation.CompiledLayers | None = None
        self._texts = TextCache()
        self._responses: dict[tuple[Any, ...], tuple[float, ...] | None] = {}

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser

    @cached_property
    def device(self) -> torch.device:
        """Where the networks compute, wherever their weights rest. Found once: diffusers walks all modules for it."""
        device: torch.device = self.pipeline._execution_device
        return device

    @cached_property
    def _dtype(self) -> str:
        return str(self._denoiser.root.dtype).removeprefix("torch.")

    @property
    def decode_dtype(self) -> torch.dtype:
        """What the autoencoder decodes in: float32 where its own activations overflow half precision (`upcasts`)."""
        import torch

        dtype: torch.dtype = self.pipeline.vae.dtype
        return torch.float32 if dtype == torch.float16 and self.upcasts else dtype

    def working_bytes(self, params: GenerationParams, images: int) -> int:
        from .memory import decode_bytes

        width, height = limits.render_size(self.spec, params.width, params.height)
        vae = self.pipeline.vae
        if self.spec.vae_tiling:
            width, height = (min(side, vae.tile_sample_min_size) for side in (width, height))
        return decode_bytes(vae, width * height * (1 if self.spec.vae_slicing else images), self.decode_dtype)

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        """One picture a seed, in their order.

        Raises UnsupportedSampler, TooFewSteps, AdapterFailed and DetectorFailed before anything is drawn, NotFinite
        where it shows; what `on_step` raises passes through, and leaves the model as it was.
        """
        batches = [params.seeds[at : at + params.batch_size] for at in range(0, len(params.seeds), params.batch_size)]
        with self._ready(params) as (written, chain):
            share = self._share(params, written)
            progress = self._progress(lambda steps: on_step(*steps), params, chain, len(batches))
            for seeds in batches:
                self._batch(params, [share], [seeds], strategy, chain, progress)
        return share.generation()

    def generate_together(
        self, requests: Sequence[GenerationParams], strategy: CacheStrategy, on_steps: StepsHook
    ) -> list[Generation | Exception]:
        """What each of several requests makes, which differ in prompts and seeds alone; or why it was not drawn.

        Their images are one batch, or several where the texts differ in length. `on_steps` hears each step of a batch
        once, with what it was to each request by its index; what it raises ends that batch alone. Raises as `generate`
        does what concerns all of them.
        """
        results: list[Generation | Exception | None] = [None] * len(requests)
        with self._ready(requests[0]) as (written, chain):
            shares = [self._share(request, written) for request in requests]
            for members in alike(shares):
                hook = partial(_by_index, on_steps, members)
                progress = self._progress(hook, requests[0], chain, 1)
                theirs = [shares[index] for index in members]
                try:
                    seeds = [requests[index].seeds for index in members]
                    self._batch(requests[0], theirs, seeds, strategy, chain, progress)
                except Exception as error:  # noqa: BLE001  # whatever ended this batch, the others know nothing of it
                    for index in members:
                        results[index] = error
                else:
                    for index in members:
                        results[index] = shares[index].generation()
        return [result for result in results if result is not None]

    @contextmanager
    def _ready(self, params: GenerationParams) -> Iterator[tuple[Written, tuple[Pass, ...]]]:
        """Within the context, requests with these settings can be drawn, by these passes."""
        import torch

        from . import passes

        samplers.check(samplers.choices(self.choices), params.sampler, params.scheduler)
        chain = passes.chain(params)
        with torch.no_grad(), quiet(), adapters.applied(self.pipeline, params) as written:
            yield written, chain

    def _share(self, params: GenerationParams, written: Written) -> Share:
        """A request's text, encoded, and what is to be said to it."""
        from .passes.drawing import Clock

        clock = Clock(self.device)
        with clock("text"):
            text = written(params)
            conditioning = self._texts.get(key_of(params), partial(self._encoded, text))
            words = embedding.without(params.prompt, params.embeddings)
            warnings = limits.warnings(self.spec, words, params.width, params.height)
            warnings += self._warnings(text)
        return Share(conditioning, warnings, clock.seconds)

    def _encoded(self, params: GenerationParams) -> dict[str, torch.Tensor]:
        encoded = self._encode(params)
        parts = ("text_encoder", "text_encoder_2")
        finite.check(encoded.values(), "The encoded text is", self.pipeline, parts)
        return encoded

    def _progress(
        self, on_steps: Callable[[Sequence[Step]], None], params: GenerationParams, chain: Sequence[Pass], batches: int
    ) -> Progress:
        from .passes.drawing import Progress

        return Progress(on_steps, batches * sum(one.steps(self, params) for one in chain))

    def _batch(
        self,
        params: GenerationParams,
        shares: Sequence[Share],
        seeds: Sequence[tuple[int, ...]],
        strategy: CacheStrategy,
        chain: Sequence[Pass],
        progress: Progress,
    ) -> None:
        """Draw the images of all `seeds` together and give each share its own."""
        from .passes import hires_fix
        from .passes.drawing import Clock, Drawing

        size = limits.render_size(self.spec, params.width, params.height)
        if params.hires_fix:
            size, _ = hires_fix.sizes(self, params)
        counts = list(map(len, seeds))
        ends = list(accumulate(counts))
        items = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        clock = Clock(self.device)
        progress.items = items
        flat = tuple(seed for each in seeds for seed in each)
        drawing = Drawing(self, params, flat, joined(shares, counts), strategy, size, clock, progress)
        for one in chain:
            one.run(drawing)
        for share, part in zip(shares, items, strict=True):
            share.take(drawing, part)
            share.spend(clock)

    @contextmanager
    def accelerated(self, params: GenerationParams) -> Iterator[tuple[attention.Attention, compilation.Compilation]]:
        """The denoiser with the attention kernel that `params` asks for, and its layers compiled if they do.

        Raises AttentionUnavailable and CompilationFailed.
        """
        with ExitStack() as stack:
            compiling = compilation.Compilation()
            if params.compiled:
                if self._compiled is None:
                    self._compiled = compilation.CompiledLayers(self._denoiser, self.compile_backend)
                compiling = stack.enter_context(self._compiled.attached())
            kernel = stack.enter_context(attention.attending(params.attention, str(self.device), self._dtype))
            yield kernel, compiling

    def view(self, params: GenerationParams, scheduler: Any) -> Denoiser:
        """The denoiser as a strategy sees it in a run that `scheduler` steps."""
        return self._denoiser

    def responses(self, scheduler: Any) -> tuple[float, ...] | None:
        """Those of a scheduler whose timesteps are set; remembered, as finding them takes a few milliseconds."""
        import torch

        from cache.solver import begun, follows, responses

        if not follows(scheduler):
            return None
        sigmas = getattr(scheduler, "sigmas", None)
        schedule = scheduler.timesteps if sigmas is None else torch.cat([scheduler.timesteps.cpu(), sigmas.cpu()])
        key = (type(scheduler), repr(sorted(scheduler.config.items())), begun(scheduler), *schedule.tolist())
        if key not in self._responses:
            if len(self._responses) == REMEMBERED:
                self._responses.clear()
            self._responses[key] = responses(scheduler)
        return self._responses[key]

    def from_pictures(self) -> Any:
        """diffusers' img2img pipeline for this one, made of the same components."""
        import diffusers

        # By name: diffusers' AutoPipelineForImage2Image would import every pipeline that there is.
        cls = getattr(diffusers, type(self.pipeline).__name__.replace("Pipeline", "Img2ImgPipeline"))
        settings = {**self.pipeline.config, **self.pipeline.components}
        wanted = inspect.signature(cls.__init__).parameters
        parts = {name: value for name, value in settings.items() if name in wanted}
        # StableDiffusionImg2ImgPipeline compares a UNet's sample_size with 64; that of oblong pictures is a list.
        pipeline = cls(**{name: None if name == "unet" else value for name, value in parts.items()})
        pipeline.register_modules(**{name: value for name, value in parts.items() if name == "unet"})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def partial_steps(self, steps: int, strength: float) -> int:
        """How many of `steps` that pipeline takes at `strength`."""
        return min(int(steps * strength), steps)

    @property
    def published_timesteps(self) -> Sequence[int]:
        """Ten training timesteps for the scheduler `ays`."""
        return samplers.AYS_TIMESTEPS

    @cached_property
    def preview_decoder(self) -> Decoder:
        """Found, or fitted, on the first request with previews."""
        from .passes.preview import decoder_of

        return decoder_of(self)

    @property
    def size_multiple(self) -> int:
        """Pixels that a drawing's sides are multiples of."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def native_pixels(self) -> int:
        """Width times height of the pictures that the network was trained on."""
        sample = getattr(self.denoiser.root.config, "sample_size", None) or self.pipeline.default_sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return int(height * width * self.pipeline.vae_scale_factor**2)

    @contextmanager
    def scheduled(self, pipeline: Any, params: GenerationParams, seeds: tuple[int, ...]) -> Iterator[Any]:
        """`pipeline` with a scheduler of one run's own, which is yielded; the saved one is back afterwards.

        The denoiser may be called with tensors on the CPU, as that scheduler's timesteps are.
        """
        from cache.patching import shadowed

        saved, root = pipeline.scheduler, self._denoiser.root
        pipeline.scheduler = samplers.build(
            saved, self.choices, params.sampler, params.scheduler, steps=params.steps, seeds=seeds
        )
        try:
            with shadowed([(root, "forward", _uploading(root.forward, self.device))]):
                yield pipeline.scheduler
        finally:
            pipeline.scheduler = saved

    def _truncation(self, tokenizer: Any, prompt: str, limit: int) -> list[str]:
        tokens = len(tokenizer(prompt).input_ids)
        if tokens <= limit:
            return []
        return [f"{self.spec.name} reads {limit} tokens; the prompt has {tokens}, and its end was not read."]

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """How the denoiser's latents lie."""

    @abstractmethod
    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor]:
        """The pipeline's arguments for the text, each with one row (1, …)."""

    @abstractmethod
    def guidance(self, params: GenerationParams) -> dict[str, float]:
        """The pipeline's arguments for guidance."""

    def decode(self, latents: torch.Tensor, width: int, height: int) -> list[Image.Image]:
        """Pictures of width × height pixels.

        In float32 where the autoencoder's own activations overflow half precision, always (`upcasts`) or in this
        picture. Raises NotFinite.
        """
        import torch

        def decoded(latents: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W), -1 … 1
            pixels: torch.Tensor = vae.decode(self.clean(latents, width, height), return_dict=False)[0]
            return pixels

        vae = self.pipeline.vae
        dtype = vae.dtype
        pixels = decoded(latents.to(dtype)) if self.decode_dtype == dtype else None
        if pixels is None or (dtype == torch.float16 and not finite.is_finite([pixels])):
            vae.to(dtype=torch.float32)
            try:
                pixels = decoded(latents.float())
            finally:
                vae.to(dtype=dtype)
        finite.check([pixels], "The decoded pixels are", self.pipeline, ["vae"])
        images: list[Image.Image] = self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

    @property
    def upcasts(self) -> bool:
        """Whether the autoencoder's decoder is known to overflow half precision."""
        return False

    @abstractmethod
    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """What the autoencoder decodes, (B, channels, height, width) of the grid."""

    @abstractmethod
    def _warnings(self, params: GenerationParams) -> list[str]:
        """What of the request this family cannot honour."""


def _uploading(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`forward` for arguments of which some lie on the CPU."""
    from torch import Tensor

    from cache.transfer import upload

    def placed(value: Any) -> Any:
        return upload(value, device) if isinstance(value, Tensor) else value

    @wraps(forward)  # pipelines read the signature
    def uploaded(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(placed, args), **{name: placed(value) for name, value in kwargs.items()})

    return uploaded


def _by_index(on_steps: StepsHook, members: Sequence[int], steps: Sequence[Step]) -> None:
    on_steps(dict(zip(members, steps, strict=True)))
