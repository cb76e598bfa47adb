"""The way of a request: its parameters are turned into stages, and each batch of its pictures goes through them.

This is the one module that knows both the models and the stages. The order:

    from noise or a picture (multi-scale acts in it) → hires → refine → decode, resample to the size asked for
    → detail → put back what a mask keeps → upscale

Each but decode, put back and upscale is a run of a denoiser with a scheduler and a cache run of its own; previews come
from all of them. A refiner goes on with the last run before it, which ends early for that.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate, count
from typing import Any

import torch
from PIL import Image

from cache import CacheStrategy
from cache.patching import Shadow, shadowed

from . import adapters, faces, limits, upscaling
from .acceleration import attention
from .adapters import embedding
from .base import FreeU, Generation, GenerationParams, StageReport, Step, StepHook, StepsHook, Timings
from .errors import ControlFailed, DrawsFromNoise, NeedsPicture
from .families import FAMILIES
from .libraries import quiet
from .loading.plan import Plan, Work, choose
from .pipeline import PipelineModel
from .sampling import samplers
from .stages import hires
from .stages.decode import Decode
from .stages.detail import ADetailer
from .stages.drawing import Clock, Drawing, Progress, SecondModel, Stage
from .stages.hires import HiresFix
from .stages.inpaint import PutBack, WithinMask
from .stages.kept import KeptRuns
from .stages.model import Sizes
from .stages.noise import FromNoise
from .stages.picture import FromPicture
from .stages.refine import Refine
from .stages.upscale import Upscale
from .text.encoded import TextCache, key_of

Conditioning = Mapping[str, torch.Tensor]
"""A pipeline's arguments for the text, by name; the first dimension is the batch."""


def stages_of(model: Sizes, params: GenerationParams) -> tuple[Stage, ...]:
    """The stages of a request in their order. Raises DetectorFailed and UpscalerFailed."""
    switch = 1.0 if params.refiner is None else params.refiner.switch
    small, full = hires.sizes(model, params) if params.hires_fix else ((0, 0), (0, 0))
    until = switch if small == full else 1.0
    first: Stage = FromNoise(until) if params.img2img is None else FromPicture(params.img2img, until)
    put_back: tuple[Stage, ...] = ()
    if params.img2img is not None and params.img2img.inpaint is not None:
        first = WithinMask(params.img2img, params.img2img.inpaint, until)
        put_back = (PutBack(params.img2img.picture),)
    enlarger = None if params.hires_upscaler is None else upscaling.load(params.hires_upscaler)
    enlarged = (HiresFix(enlarger, switch),) if params.hires_fix else ()
    drawn = hires.STRENGTH if small != full else 1.0 if params.img2img is None else params.img2img.denoise
    refined = (Refine(switch, drawn),) if params.refiner is not None else ()
    detailed = (ADetailer(faces.finder(params.face_detector)),) if params.adetailer else ()
    upscaled = (Upscale(upscaling.load(params.upscale)),) if params.upscale is not None else ()
    return (first, *enlarged, *refined, Decode(), *detailed, *put_back, *upscaled)


def freed(unet: Any, freeu: FreeU | None) -> list[Shadow]:
    """What lets the UNet's up blocks scale what they take, as after diffusers' `enable_freeu`."""
    factors = {} if freeu is None else asdict(freeu)
    return [(block, name, factor) for name, factor in factors.items() for block in unet.up_blocks]


_LOADS = count()  # tells models that were loaded one after the other under one name apart


class LoadedModel:
    """A model and the way of a request through it: the text is encoded once, each batch goes through the stages.

    Not thread-safe: a diffusers scheduler holds the step index. kept_bytes: of main memory, for finished runs.
    """

    def __init__(self, model: PipelineModel, kept_bytes: int = 0) -> None:
        self.model = model
        self.spec, self.pipeline, self.denoiser = model.spec, model.pipeline, model.denoiser
        self._texts = TextCache()
        self._runs = KeptRuns(kept_bytes)
        self._refiner: LoadedModel | None = None
        self._load = next(_LOADS)

    @contextmanager
    def refined_by(self, refiner: LoadedModel) -> Iterator[None]:
        """Within the context requests may ask for `refiner`; the networks of both lie where both together fit.

        What it makes is decoded by this model's autoencoder, as all else is.
        """
        model, other = self.model, refiner.model
        with ExitStack() as stack:
            stack.enter_context(shadowed([(other.pipeline, "vae", model.pipeline.vae), (self, "_refiner", refiner)]))
            if model.residence is not None and other.residence is not None:
                joint = stack.enter_context(model.residence.beside(other.residence))
                stack.enter_context(shadowed([(model, "residence", joint), (other, "residence", joint)]))
                joint.settle(model.planned(joint, model.usual_work.beside(other.usual_work)))
            yield

    def working_bytes(self, params: GenerationParams, images: int) -> int:
        """Bytes of the device's memory, beside what lies there now, that a batch of so many images needs.

        A lower bound, the decode's, where all networks lie on the device: a denoising step hardly ever takes more.
        """
        model, residence = self.model, self.model.residence
        size = limits.render_size(model.spec, params.width, params.height)
        if residence is None or not residence.plan.moved:
            tiled = params.vae_tiling or (residence is not None and residence.plan.tiled)
            controls = model.controlnets.missing_bytes(params.control) if params.control else 0
            return model.decode_bytes(*size, images, tiled=tiled) + controls
        plan = replace(residence.plan, tiled=residence.plan.tiled or params.vae_tiling)
        return max(0, plan.need(residence.sizes, self._work(params, images)) - residence.held)

    def tighter(self, params: GenerationParams, free: int) -> Plan | None:
        """A plan under which one image fits, where `free` bytes are free now.

        None if there is no other, or the operator has chosen.
        """
        residence = self.model.residence
        if residence is None or self.spec.offload is not None:
            return None
        work, memory = self._work(params, 1), free + residence.held
        plan = choose(residence.sizes, work, memory)
        return plan if plan != residence.plan and plan.need(residence.sizes, work) <= memory else None

    @contextmanager
    def settled(self, plan: Plan) -> Iterator[None]:
        """Within the context the networks lie as `plan` says; afterwards as before."""
        residence = self.model.residence
        if residence is None:
            raise ValueError("there is nothing to settle")
        before = residence.plan
        try:
            residence.settle(plan)
            yield
        finally:
            residence.settle(before)

    def _work(self, params: GenerationParams, images: int) -> Work:
        size = limits.render_size(self.model.spec, params.width, params.height)
        work = self.model.work(*size, images, guided=self.model.runs_twice(params))
        if params.control:
            work = work.with_more(self.model.controlnets.missing_bytes(params.control))
        if self._refiner is None:
            return work
        second = self._refiner.model
        return work.beside(second.work(*size, images, guided=second.runs_twice(params)))

    def _copied(self) -> int:
        """Bytes of weights that were brought to the device so far."""
        return 0 if self.model.residence is None else self.model.residence.copied

    def _told(self, before: int) -> list[str]:
        """What to say of the copying since there had been so much."""
        residence = self.model.residence
        if residence is None or (copied := residence.copied - before) == 0:
            return []
        return [f"{residence.plan.words(residence.sizes)} {copied / 1e9:.1f} GB were copied, which takes time."]

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        """One picture a seed, in their order, each batch under `strategy` attached afresh.

        Raises UnsupportedSampler, NeedsPicture, DrawsFromNoise, TooFewSteps, AdapterFailed, DetectorFailed,
        UpscalerFailed and ControlFailed before anything is drawn, NotFinite where it shows; what `on_step` raises
        passes, and leaves the model as it was.
        """
        batches = [params.seeds[at : at + params.batch_size] for at in range(0, len(params.seeds), params.batch_size)]
        before = self._copied()
        asked = self._runs.asked(params)
        if asked is not None and self._refiner is not None:
            asked = {**asked, "refined by": self._refiner._load}
        with self._ready(params) as (applied, stages, steps):
            share = self._share(params, applied)
            progress = Progress(lambda each: on_step(*each), steps * len(batches))
            for seeds in batches:
                self._batch(params, [share], [seeds], strategy, stages, progress, asked)
        share.warnings += self._told(before)
        return share.generation()

    def generate_together(
        self, requests: Sequence[GenerationParams], strategy: CacheStrategy, on_steps: StepsHook
    ) -> list[Generation | Exception]:
        """What each of several requests makes, which differ in prompts and seeds alone; or why it was not drawn.

        Their images are one batch, or several where the texts differ in length; an error ends its batch alone. A
        picture is what it would be without the others, but for the rounding that a batch's size brings: so none of
        their runs is kept, nor gone on from.
        """
        results: list[Generation | Exception | None] = [None] * len(requests)
        before = self._copied()
        with self._ready(requests[0]) as (applied, stages, steps):
            shares = [self._share(request, applied) for request in requests]
            for members in alike(shares):
                hook = partial(_by_index, on_steps, members)
                progress = Progress(hook, steps)
                theirs = [shares[index] for index in members]
                try:
                    seeds = [requests[index].seeds for index in members]
                    self._batch(requests[0], theirs, seeds, strategy, stages, progress)
                except Exception as error:  # noqa: BLE001  # whatever ended this batch, the others know nothing of it
                    for index in members:
                        results[index] = error
                else:
                    for index in members:
                        shares[index].warnings += self._told(before)
                        results[index] = shares[index].generation()
        return [result for result in results if result is not None]

    @contextmanager
    def _ready(self, params: GenerationParams) -> Iterator[tuple[adapters.Applied, tuple[Stage, ...], int]]:
        """Within the context, requests with these settings can be drawn, by these stages in so many steps a batch."""
        samplers.check(samplers.choices(self.model.choices), params.sampler, params.scheduler)
        family = FAMILIES[self.spec.family]
        if params.img2img is None and family.needs_picture:
            raise NeedsPicture(f"{self.spec.name} is a refiner, and draws over pictures alone: send one (img2img).")
        if not family.draws_over and (params.img2img is not None or params.hires_fix or params.adetailer):
            raise DrawsFromNoise(
                f"{self.spec.name} draws from noise alone: leave img2img, hires-fix and ADetailer out, or take a model "
                "of another family."
            )
        if params.control and not family.controlnets:
            raise ControlFailed(f"{self.spec.name} is of a family that has no ControlNets: leave control out.")
        stages = stages_of(self.model, params)
        self.model.controlnets.ready(params.control)
        with (
            torch.no_grad(),
            quiet(),
            self.model.decoding(tiled=params.vae_tiling),
            shadowed(freed(self.denoiser.root, params.freeu)),
            adapters.applied(self.pipeline, params) as applied,
        ):
            yield applied, stages, sum(one.steps(self.model, params) for one in stages)

    def _share(self, params: GenerationParams, applied: adapters.Applied) -> Share:
        """A request's text, encoded, and what is to be said to it."""
        clock = Clock(self.model.device)
        with clock("text"):
            text = applied.written(params)
            conditioning = self._read(params, text)
            words = embedding.without(params.prompt, params.embeddings)
            warnings = limits.warnings(self.model.spec, words, params.width, params.height)
            warnings += self.model.warnings(text) + applied.warnings
            refined = {} if self._refiner is None or params.refiner is None else self._refiner.reread(params)
            if refined and (params.loras or params.embeddings or params.freeu or params.control):
                what = "LoRAs, embeddings, ControlNets and FreeU"
                warnings.append(f"{what} are the model's: the refiner goes on without them.")
        return Share(conditioning, warnings, clock.seconds, refined)

    def reread(self, params: GenerationParams) -> Conditioning:
        """The request's text as this model reads it without adapters."""
        plain = replace(params, loras=(), embeddings=())
        return self._read(plain, plain)

    def _read(self, params: GenerationParams, text: GenerationParams) -> Conditioning:
        """Encoded, or remembered; `text`: the request as adapters have written it."""
        key = key_of(params, guided=self.model.runs_twice(params))
        return self._texts.get(key, partial(self.model.encode, text))

    def _batch(
        self,
        params: GenerationParams,
        shares: Sequence[Share],
        seeds: Sequence[tuple[int, ...]],
        strategy: CacheStrategy,
        stages: Sequence[Stage],
        progress: Progress,
        asked: Mapping[str, Hashable] | None = None,
    ) -> None:
        """Draw the images of all `seeds` together and give each share its own. asked: as KeptRuns.draw takes it."""
        model = self.model
        size = limits.render_size(model.spec, params.width, params.height)
        if params.hires_fix:
            size, _ = hires.sizes(model, params)
        counts = list(map(len, seeds))
        ends = list(accumulate(counts))
        items = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        progress.items = items
        flat = tuple(seed for each in seeds for seed in each)
        refiner = None
        if self._refiner is not None and params.refiner is not None:
            refiner = SecondModel(self._refiner.model, joined([share.refined for share in shares], counts))
        conditioning, clock = joined([share.conditioning for share in shares], counts), Clock(model.device)
        drawing = Drawing(model, params, flat, conditioning, strategy, size, clock, progress, refiner)
        decode = stages.index(Decode())
        self._runs.draw(drawing, stages[:decode], asked)
        for one in stages[decode:]:
            one.run(drawing)
        for share, part in zip(shares, items, strict=True):
            share.take(drawing, part)


@dataclass(slots=True)
class Share:
    """What one request gets of the batches that it is drawn in.

    `conditioning` has one row each, and so has `refined`, the refiner's; what comes behind is filled batch by batch.
    """

    conditioning: Conditioning
    warnings: list[str]
    seconds: dict[str, float]
    refined: Conditioning = field(default_factory=dict)
    images: list[Image.Image] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    sampling: tuple[str, str] | None = None
    batches: list[int] = field(default_factory=list)

    def take(self, drawing: Drawing, items: slice) -> None:
        """Add the images `items` of a finished batch, which takes its time for each of its requests."""
        self.images += drawing.images[items]
        batch = len(drawing.seeds)
        reports = drawing.stages
        if len(range(batch)[items]) < batch:  # others are drawn in it, whose decisions may differ
            reports = [replace(one, cache=one.cache.of_items(items, batch)) for one in reports]
        self.stages += reports
        self.batches += [batch] if not items.start else []
        self.kernels += drawing.kernels
        self.sampling = drawing.sampling
        said = [*drawing.warnings, *(sentence for one in reports for sentence in one.cache.warnings)]
        self.warnings += [sentence for sentence in dict.fromkeys(said) if sentence not in self.warnings]
        for part, seconds in drawing.clock.seconds.items():
            self.seconds[part] += seconds

    def generation(self) -> Generation:
        return Generation(
            images=self.images,
            stages=self.stages,
            timings=Timings(**{f"{part}_seconds": seconds for part, seconds in self.seconds.items()}),
            warnings=self.warnings,
            batches=self.batches,
            sampling=self.sampling,
            attention=next((kernel for kernel in self.kernels if kernel != attention.SDPA), attention.SDPA),
        )


def joined(texts: Sequence[Conditioning], images: Sequence[int]) -> Conditioning:
    """Those of a batch in which each has so many images, a row each. All have the same shapes (`alike`)."""
    pairs = list(zip(texts, images, strict=True))
    return {name: torch.cat([text[name].repeat_interleave(count, dim=0) for text, count in pairs]) for name in texts[0]}


def alike(shares: Sequence[Share]) -> list[list[int]]:
    """Which shares have texts of the same shapes, by their indices.

    A prompt of several windows has more tokens than one of one. Filled up to the longest, the shorter would be another
    text to a denoiser that attends to all tokens, and the picture would depend on its neighbours.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, share in enumerate(shares):
        texts = [*share.conditioning.items(), *share.refined.items()]
        groups.setdefault(tuple((name, tuple(tensor.shape)) for name, tensor in texts), []).append(index)
    return list(groups.values())


def _by_index(on_steps: StepsHook, members: Sequence[int], steps: Sequence[Step]) -> None:
    on_steps(dict(zip(members, steps, strict=True)))
