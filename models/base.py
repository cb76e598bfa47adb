"""What a generation is: its parameters, its steps, its result; what a configured model is.

Nothing heavy is imported here: the HTTP process uses these types without torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

    from cache import CacheReport

CacheName = Literal["deepcache", "first_block"]
DtypeName = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "text", "model", "group", "sequential"]
Quantization = Literal["fp8", "int8", "nf4"]
Prediction = Literal["epsilon", "v_prediction"]
Distilled = Literal["turbo", "lightning", "lcm", "hyper"]
Fill = Literal["original", "noise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA's file, found under the operator's folder, and its strength: 1 as trained, 0 off.

    `text_weight`: its strength in the text encoders, where that is another.
    """

    name: str
    path: Path
    weight: float = 1.0
    text_weight: float | None = None

    def weight_of(self, component: str) -> float:
        """Its strength in one of a pipeline's networks."""
        return self.weight if self.text_weight is None or not component.startswith("text") else self.text_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A textual inversion's file; its name stands in one of the prompts."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Upscaler:
    """The file of a network that enlarges pictures, found under the operator's folder."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A picture that steers where things stand, by a ControlNet of the operator's folder (Zhang et al. 2023).

    `path`: its file, or its folder in diffusers format. `image` is RGB and of any size; it is scaled to cover the
    drawing, and the overhang is cut evenly. It is the map that the ControlNet was trained on; with `edges` it is any
    picture, whose edges become the map. `weight`: of what it adds, 0 nothing. `start`, `end`: the shares of each run
    between which it acts.
    """

    name: str
    path: Path
    image: Image.Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    edges: bool = False


ResamplingName = Literal["Lanczos", "Nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlargement:
    """Pictures, RGB, to be enlarged as they are: no model draws over them.

    Each becomes `factor` times as wide and high or, with `size`, covers so many pixels (width, height); `crop` cuts the
    overhang evenly. `upscalers`: none leaves them as they are, of two the second has the share `blend` of the result.
    """

    pictures: tuple[Image.Image, ...]
    upscalers: tuple[Upscaler | ResamplingName, ...]
    blend: float = 0.0
    factor: float = 2.0
    size: tuple[int, int] | None = None
    crop: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name if isinstance(one, Upscaler) else one for one in self.upscalers)

    def target(self, picture: Image.Image) -> tuple[int, int]:
        """(width, height), pixels, to which the picture is enlarged, before it is cut."""
        width, height = picture.size
        factor = self.factor if self.size is None else max(self.size[0] / width, self.size[1] / height)
        return max(1, round(width * factor)), max(1, round(height * factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inpaint:
    """Draw a part of a picture anew and leave the rest as it is.

    `mask` is L and of the picture's aspect; where it is 128 or more is drawn. How much of that shows is the mask
    itself, softened by a Gaussian of `blur` pixels of the answer. `fill`: what the part begins from. `padding`: the
    pixels around the mask that are drawn with it at the request's size; None draws the whole picture.
    """

    mask: Image.Image
    blur: int = 4
    fill: Fill = "original"
    padding: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Img2Img:
    """Begin from a picture: the last `denoise` of the noise schedule is run on it, above 0 and up to 1.

    `picture` is RGB and of any size; it is scaled to cover the drawing, and the overhang is cut evenly. `inpaint`: a
    part of it alone is drawn.
    """

    picture: Image.Image
    denoise: float = 0.75
    inpaint: Inpaint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refiner:
    """A second model, by name, that goes on once `switch` of the noise schedule is done: above 0 and below 1."""

    model: str
    switch: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiscale:
    """Run the steps between the first `fullres_start` and the last `fullres_end` on latents of `factor` times the size.

    `intermittent`: every fourth step in between is at full size all the same.
    """

    factor: float = 0.5
    fullres_start: int = 3
    fullres_end: int = 8
    intermittent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeU:
    """Factors of the up path's first two levels: of the state that comes from below, and of its skips' low frequencies.

    Si et al. 2023, "FreeU: Free Lunch in Diffusion U-Net"; at 1 all four change nothing.
    """

    b1: float
    b2: float
    s1: float
    s2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One request for pictures, validated, with every default filled in.

    `width` and `height` are the pixels of the answer; `seeds` has one entry an image; `batch_size` images are
    denoised together. `clip_skip` n reads the text encoder n - 1 layers before the one that the model was trained on.
    `guidance_rescale` is φ of Lin et al. 2024, section 3.4. `guidance_start`, `guidance_end`: the shares of each run
    between which it is guided (`models/guidance.py`).
    `attention` names a kernel of `models/acceleration/attention.py`, or leaves the choice to it (`auto`);
    `compiled` runs the denoiser's layers compiled. `vae_tiling` decodes in tiles, as the model's own setting does.
    Stages beyond the first (`models/stages`) are off by default. `hires_upscaler` enlarges between the runs of
    hires-fix, None: Lanczos; `upscale` the finished pictures, which are larger than `width` × `height` then.
    `face_detector` is the operator's file for ADetailer.
    `owner`: for whom the finished runs are kept, who alone goes on from them (`models/stages/kept.py`); None: nobody.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    guidance_scale: float = 7.5
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 1
    sampler: str | None = None
    scheduler: str | None = None
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    clip_skip: int | None = None
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    freeu: FreeU | None = None
    attention: str = "auto"
    compiled: bool = False
    vae_tiling: bool = False
    img2img: Img2Img | None = None
    control: tuple[Control, ...] = ()
    refiner: Refiner | None = None
    hires_fix: bool = False
    hires_upscaler: Upscaler | None = None
    adetailer: bool = False
    face_detector: Path | None = None
    multiscale: Multiscale | None = None
    upscale: Upscaler | None = None
    preview: bool = False
    owner: str | None = None

    def sampled_by(self, sampling: tuple[str, str] | None) -> GenerationParams:
        """The same with the sampler and scheduler that drew, where the request had left them to the model."""
        return self if sampling is None else replace(self, sampler=sampling[0], scheduler=sampling[1])


@dataclass(frozen=True, slots=True)
class Step:
    """A finished denoising step: `index` counts from 0 to `total` - 1 over all stages and batches of the request.

    `total` grows when ADetailer has found faces: how many there are is not known before.

    `decision` holds the letters (C computed, R reused) of the denoiser calls that the step made: one for most
    samplers, two for those of second order. `preview` is a small picture of how far the latents have come, as the
    bytes of a JPEG file, where one was asked for.
    """

    index: int
    total: int
    decision: str
    preview: bytes | None = None


StepHook = Callable[[Step], None]
StepsHook = Callable[[Mapping[int, Step]], None]
"""Hears a step of a batch: what it was to each of the requests in it, by their indices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds spent in each part of a generation, summed over its batches; compiling is no part of denoising."""

    text_seconds: float
    denoise_seconds: float
    decode_seconds: float
    compile_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """One run of the denoiser under a cache: the stage that made it, its steps, its size in pixels.

    `sizes`: with multi-scale, a letter for each denoiser call, F at full size, S small, which is `small_share` of it.
    `halves`: with guidance in a part of the run, B, T or N for each call (`models/guidance.py`).
    `kept`: an earlier request had made it, and it was not made again.
    """

    name: str
    cache: CacheReport
    steps: int
    width: int
    height: int
    sizes: str = ""
    halves: str = ""
    small_share: float = 1.0
    kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a request made: one picture a seed, one report a stage and batch as they ran, sentences for the user.

    `attention` is the kernel that computed the denoiser's attention. `batches`: how many images were denoised together
    in each batch; one that several requests shared stands with the first of them alone. `sampling`: sampler and
    scheduler by name, also where the request left them to the model.
    """

    images: list[Image.Image]
    stages: list[StageReport]
    timings: Timings
    warnings: list[str] = field(default_factory=list)
    attention: str = "sdpa"
    batches: list[int] = field(default_factory=list)
    sampling: tuple[str, str] | None = None

    @property
    def reports(self) -> list[CacheReport]:
        return [one.cache for one in self.stages]


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hugging Face hub at a revision: branch, tag or commit. Only an operator names one.

    `variant` picks among weights saved more than once, as `fp16` does.
    """

    repository: str
    revision: str = "main"
    variant: str | None = None

    def __str__(self) -> str:
        return f"the hub's {self.repository}, revision {self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A configured model: where it lies and what it defaults to.

    `source`: a folder in diffusers format, a single `.safetensors` or `.gguf` file in the original layout, or a hub
    repository.
    `config`: for a single file, a folder of configurations, tokenizers and perhaps networks that the file lacks. None:
    the published ones of its family (`models/loading/shapes.py`).
    `parts`: component (`vae`, `text_encoder`, `text_encoder_2`, …) → the file that it comes from in place of the
    source's; `tokenizer`, … → the folder of T5's tokenizer.
    `dtype`: of the weights in memory; None: half precision on an accelerator, float32 on the CPU.
    `quantization`: what the weights of the denoiser and of T5 are kept in, while `dtype` is what is computed in.
    `prediction_type`, `rescale_betas_zero_snr`: override what the model's files say the network predicts, and whether
    its noise schedule is stretched to end in pure noise (Lin et al. 2024).
    `distilled`: by which method it was taught to draw in few steps, without guidance.
    `offload`: which networks lie in main memory while they do not run: `none`, those that read a `text`, all in turns
    (`model`), too large ones block by block (`group`), or layer by layer (`sequential`). None: as a plan finds for the
    device's memory (`loading/plan.py`).
    `vae_tiling`, `vae_slicing`: decode pictures in tiles, and batches one by one, to need less memory.
    `render_sizes`: the (width, height) pairs, pixels, that the model draws well. Empty: any size that the request
    names. Otherwise a request is drawn at the pair of the nearest aspect and resampled.
    `fine_decoder`: the folder of a decoder of four times the resolution (`models/fine.py`), for a request of more
    pixels than were drawn. None: the autoencoder's own.
    `vocabulary`: the words that the model was trained on. Empty: any.
    """

    name: str
    family: str
    source: Path | Hub
    config: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    dtype: DtypeName | None = None
    quantization: Quantization | None = None
    prediction_type: Prediction | None = None
    rescale_betas_zero_snr: bool | None = None
    distilled: Distilled | None = None
    offload: Offload | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    steps: int | None = None
    guidance_scale: float | None = None
    render_sizes: tuple[tuple[int, int], ...] = ()
    fine_decoder: Path | None = None
    vocabulary: frozenset[str] = frozenset()


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class LoadHooks:
    """What a loader tells whoever waits for it.

    `stage` hears which part comes next, in a few words. `room` hears, before any weights are read, how many bytes of
    the device's memory they will take; it may make room for them, or raise LoadFailed.
    """

    stage: Callable[[str], None] = _ignore
    room: Callable[[int], None] = _ignore


UNWATCHED = LoadHooks()
