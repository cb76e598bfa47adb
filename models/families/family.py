"""A family of models: what tells it from its neighbours, and how one of it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.base import UNWATCHED, CacheName, DtypeName, FreeU, LoadHooks, ModelSpec
from models.libraries import quiet
from models.loading.file import check_family, single_file
from models.loading.folder import check_class, check_traits, dtype_for, load_pipeline, read_json
from models.masks import INPAINTING
from models.pipeline import PipelineModel
from models.sampling.samplers import Sampler, choices


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily(ABC):
    """One architecture. Stateless.

    native_size: pixels of a side of the square that the family was trained at.
    pipeline, network: the diffusers class, and the component of it that denoises.
    text_encoders: the transformers class of each. extras: arguments of the pipeline's constructor.
    half: what the weights are in on an accelerator, unless the spec says otherwise.
    traits: what the network's configuration says in this family and not in its neighbours; settings: what the
    pipeline's index does.
    cache: the one that acts on this family's denoiser.
    freeu: the factors that its authors published for this family; None where there are no skips.
    controlnets: whether ControlNets are made for it.
    refiners: families whose models can go on from this one's latents. needs_picture: it draws over pictures alone;
    draws_over: it draws over pictures at all.
    """

    name: str
    native_size: int
    pipeline: str
    network: str
    text_encoders: Mapping[str, str]
    extras: Mapping[str, Any] = field(default_factory=dict)
    half: DtypeName
    traits: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    cache: CacheName
    table: Mapping[str, Sampler]
    size_multiple: int
    steps: int
    guidance_scale: float
    freeu: FreeU | None
    controlnets: bool = False
    refiners: frozenset[str] = frozenset()
    needs_picture: bool = False
    draws_over: bool = True

    @property
    def samplers(self) -> Mapping[str, tuple[str, ...]]:
        """Sampler name → names of the schedulers it can be paired with."""
        return choices(self.table)

    def check(self, spec: ModelSpec) -> None:
        """Raise LoadFailed if the files say that they are another family's; reads configurations and headers only."""
        if (file := single_file(spec)) is not None:
            check_family(spec, file)
        check_class(spec, self.pipeline)
        check_traits(spec, f"{self.network}/config.json", self.traits)
        check_traits(spec, "model_index.json", self.settings)

    def reuse_costs(self, spec: ModelSpec) -> tuple[float, ...]:
        """Floating-point operations of a reuse step at each branch, as shares of a full step, without the weights.

        Empty where the cache has no branches. Raises LoadFailed.
        """
        self.check(spec)
        return ()

    def inpaints(self, spec: ModelSpec) -> bool:
        """Whether its network takes a mask and the masked picture beside the latents. Raises LoadFailed."""
        return read_json(spec, f"{self.network}/config.json").get("in_channels") in INPAINTING

    def load(
        self, spec: ModelSpec, device: str, hooks: LoadHooks = UNWATCHED, memory: int | None = None
    ) -> PipelineModel:
        """The model in the spec's dtype, else in the one that suits the device. Raises LoadFailed.

        memory: bytes of the device that it may count on, see `PipelineModel.settle`.
        """
        self.check(spec)
        with quiet():
            import diffusers
            import transformers

            pipeline = load_pipeline(
                getattr(diffusers, self.pipeline),
                {component: getattr(transformers, name) for component, name in self.text_encoders.items()},
                spec,
                device,
                dtype_for(spec, device, self.half),
                hooks,
                **self.extras,
            )
            model = self.model(spec, pipeline)
            model.settle(device, memory, hooks)
        return model

    @abstractmethod
    def model(self, spec: ModelSpec, pipeline: Any) -> PipelineModel:
        """Around a loaded pipeline."""
