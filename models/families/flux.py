"""Flux: CLIP and T5 text, a transformer of double- and single-stream blocks on packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.base import CacheName, DtypeName, FreeU, GenerationParams, ModelSpec
from models.pipeline import PipelineModel
from models.run import Kind
from models.sampling.samplers import FLOW_MATCHING, Sampler
from models.text.prompt import remarks

from .family import ModelFamily

if TYPE_CHECKING:
    import torch

    from models.layout import Layout

_KEPT_STREAMS = 10  # the first-block cache's residuals and references, in two calls, and what is made of them
LONGEST_TEXT = 512  # T5 tokens, the pipeline's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxFamily(ModelFamily):
    """A family of FluxPipeline models (Black Forest Labs 2024)."""

    native_size: int = 1024
    pipeline: str = "FluxPipeline"
    network: str = "transformer"
    text_encoders: Mapping[str, str] = field(
        default_factory=lambda: {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    )
    half: DtypeName = "bfloat16"
    cache: CacheName = "first_block"
    table: Mapping[str, Sampler] = field(default_factory=lambda: FLOW_MATCHING)
    size_multiple: int = 16
    steps: int = 28
    guidance_scale: float = 3.5
    freeu: FreeU | None = None
    controlnets: bool = True

    def model(self, spec: ModelSpec, pipeline: Any) -> FluxModel:
        from cache import TransformerDenoiser

        return FluxModel(spec, pipeline, TransformerDenoiser(pipeline.transformer), self.table)


FLUX = FluxFamily(name="flux")
FLUX_SCHNELL = FluxFamily(
    name="flux-schnell",
    traits={"guidance_embeds": False},
    steps=4,
    guidance_scale=0.0,  # distilled to few steps; a scale above 1 would run it twice a step
)
FLUX_DEV = FluxFamily(name="flux-dev", traits={"guidance_embeds": True})
FLUX_FILL = FluxFamily(
    name="flux-fill",
    pipeline="FluxFillPipeline",
    traits={"guidance_embeds": True, "in_channels": 384},
    steps=50,
    guidance_scale=30.0,
)


class FluxModel(PipelineModel):
    """A guidance-distilled transformer takes the scale as an input; another runs a second, unconditional call."""

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings = self._embed(params.prompt)
        if self.runs_twice(params):
            embeddings |= {f"negative_{name}": value for name, value in self._embed(params.negative_prompt).items()}
        return embeddings

    def _embed(self, prompt: str) -> dict[str, torch.Tensor | None]:
        tokens, pooled, _ = self.pipeline.encode_prompt(prompt, max_sequence_length=self._text_length)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}  # (1, tokens, D), (1, D')

    @property
    def layout(self) -> Layout:
        from models.layout import Packed

        return Packed()

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        import torch

        config, dtype = self.pipeline.transformer.config, self.pipeline.vae.dtype
        tokens, text = height * width // 4, self._text_length

        def tensor(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        given = {
            "hidden_states": tensor(1, tokens, config.in_channels),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "pooled_projections": tensor(1, config.pooled_projection_dim),
            "timestep": tensor(1),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(text, 3),
        }
        return given | ({"guidance": tensor(1)} if config.guidance_embeds else {})

    def rows(self, *, guided: bool) -> int:
        return 1  # with guidance in two calls

    @property
    def kept_cells(self) -> int:
        config = self.pipeline.transformer.config
        return _KEPT_STREAMS * int(config.num_attention_heads * config.attention_head_dim) // 4  # four cells a token

    def runs_twice(self, params: GenerationParams) -> bool:
        return not self._distilled and params.guidance_scale > 1

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        scale = params.guidance_scale
        if self._distilled:
            return {"guidance_scale": scale}
        return {"true_cfg_scale": scale if self.runs_twice(params) else 1.0}

    def sibling(self, kind: Kind) -> Any:
        """With steps counted as steps, where diffusers' pipeline takes a second-order scheduler's calls for them, and
        with the lanes that it does not name.
        """
        pipeline = super().sibling(kind)

        def get_timesteps(calls: int, strength: float, device: object) -> tuple[torch.Tensor, int]:
            scheduler = pipeline.scheduler
            steps = -(-calls // scheduler.order)
            begin = steps - self.partial_steps(steps, strength)
            scheduler.set_begin_index(begin * scheduler.order)
            return scheduler.timesteps[begin * scheduler.order :], steps - begin

        pipeline.get_timesteps = get_timesteps
        pipeline.__dict__["transformer"] = _Laned(pipeline.transformer)
        return pipeline

    def partial_steps(self, steps: int, strength: float) -> int:
        return steps - int(max(steps - min(steps * strength, steps), 0))  # diffusers' rounding for Flux

    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        config = self.pipeline.vae.config
        latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        scaled: torch.Tensor = latents / config.scaling_factor + config.shift_factor
        return scaled

    def warnings(self, params: GenerationParams) -> list[str]:
        sentences = remarks(f"{params.prompt}\n{params.negative_prompt}", weights=False)
        tokens = len(self.pipeline.tokenizer_2(params.prompt).input_ids)
        if tokens > self._text_length:
            read = f"{self.spec.name} reads {self._text_length} tokens"
            sentences.insert(0, f"{read}; the prompt has {tokens}, and its end was not read.")
        if params.negative_prompt and not self.runs_twice(params):
            reason = "is guidance-distilled" if self._distilled else "runs without guidance at a scale of 1 or less"
            sentences.append(f"The negative prompt has no effect: {self.spec.name} {reason}.")
        return sentences

    @property
    def _distilled(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def _text_length(self) -> int:
        return int(min(self.pipeline.tokenizer_2.model_max_length, LONGEST_TEXT))


class _Laned:
    """A run's transformer to a pipeline that calls it with text, then without, and says neither.

    A cache would hold what was kept of the one against the other.
    """

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._text: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, **inputs: Any) -> Any:
        text = inputs["encoder_hidden_states"]
        self._text = text if self._text is None else self._text
        with self._transformer.cache_context("cond" if text is self._text else "uncond"):
            return self._transformer(**inputs)
