"""The configured models by name, each loaded when it is first asked for.

Importing this module, and asking it for specs and families, needs neither torch nor diffusers.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .acceleration import attention, compilation
from .base import LoadFailed, LoadHooks, ModelSpec, UnknownModel
from .families import FAMILIES
from .families.family import ModelFamily

if TYPE_CHECKING:
    from .generation import LoadedModel

_GIB = 2**30


class Registry:
    """Names → specs → loaded models on one `device`. `default` and `default_flux` are names of `specs`.

    `memory`: bytes that all loaded weights together may take; None sets no bound. A load that needs room drops the
    models that were used longest ago. `device_memory`: bytes that one model and a request of it may take on a GPU; None
    puts each model there as a whole. `on_stage` hears the name of a model that is being loaded and which part of it.
    Raises UnknownModel for a name that is not configured; ValueError for specs that contradict one another.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        default: str,
        default_flux: str | None,
        device: str = "cpu",
        *,
        memory: int | None = None,
        device_memory: int | None = None,
    ) -> None:
        specs = tuple(specs)
        self._specs = {spec.name: spec for spec in specs}
        if len(self._specs) != len(specs):
            raise ValueError("two models are configured under one name")
        for spec in specs:
            if spec.family not in FAMILIES:
                raise ValueError(f"the model {spec.name!r} is of family {spec.family!r}; there are: {list(FAMILIES)}")
        self.default = self.spec(default).name
        self.default_flux = None if default_flux is None else self.spec(default_flux).name
        self.device = device
        self.memory = memory
        self.device_memory = device_memory
        self.on_stage: Callable[[str, str], None] = lambda name, stage: None
        self._loaded: dict[str, LoadedModel] = {}  # the one used last is last
        self._sizes: dict[str, int] = {}  # bytes that the loaded ones take
        self._costs: dict[str, tuple[float, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        return tuple(self._loaded)

    @property
    def plans(self) -> dict[str, dict[str, Any]]:
        """Where the networks of the models in memory lie, by name, JSON-ready; nothing of those that had no plan."""
        rows = {name: loaded.model.plan_row() for name, loaded in self._loaded.items()}
        return {name: row for name, row in rows.items() if row is not None}

    @property
    def held(self) -> int:
        """Bytes that the weights of the models in memory take, by their files."""
        return sum(self._sizes[name] for name in self._loaded)

    def spec(self, name: str) -> ModelSpec:
        try:
            return self._specs[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._specs, n=3, cutoff=0.4) or list(self._specs)
            raise UnknownModel(f"There is no model {name!r}. Nearest: {', '.join(near)}.") from None

    def family(self, name: str) -> ModelFamily:
        return FAMILIES[self.spec(name).family]

    def get(self, name: str) -> LoadedModel:
        """The model, loaded on first use and kept while there is room. Raises LoadFailed."""
        from .generation import LoadedModel

        model = self._loaded.pop(name, None)
        if model is None:
            sizes: list[int] = []

            def room(size: int) -> None:
                self._make_room(name, size)
                sizes.append(size)

            hooks = LoadHooks(stage=lambda stage: self.on_stage(name, stage), room=room)
            pipeline = self.family(name).load(self.spec(name), self.device, hooks, self.device_memory)
            model = LoadedModel(pipeline)
            self._sizes[name] = sum(sizes)
        self._loaded[name] = model
        return model

    def _make_room(self, name: str, size: int) -> None:
        """Drop models, the one used longest ago first, until `size` more bytes fit."""
        if self.memory is None:
            return
        if size > self.memory:
            raise LoadFailed(
                f"The weights of {name!r} take {size / _GIB:.2f} GiB and the models' memory is "
                f"{self.memory / _GIB:.2f} GiB. Raise WAVESPEED_MODEL_MEMORY, or give the model a smaller dtype or "
                "`offload` in the models file."
            )
        while self.held + size > self.memory:
            oldest = next(iter(self._loaded))
            self.on_stage(name, f"dropping {oldest} to make room")
            self._drop(oldest)

    def give_up_idle(self, used: str, missing: int = 0) -> str | None:
        """Drop the model used longest ago that is not `used`, and return its name.

        None: there is no other, or the weights of all others together do not take `missing` bytes.
        """
        idle = [name for name in self._loaded if name != used]
        if not idle or sum(self._sizes[name] for name in idle) < missing:
            return None
        self._drop(idle[0])
        return idle[0]

    def _drop(self, name: str) -> None:
        del self._loaded[name], self._sizes[name]
        gc.collect()  # a pipeline and its hooks refer to one another
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def reuse_costs(self, name: str) -> tuple[float, ...]:
        """Cost of a reuse step at each branch as a share of a full step; empty without branches. Raises LoadFailed."""
        if name not in self._costs:
            self._costs[name] = self.family(name).reuse_costs(self.spec(name))
        return self._costs[name]

    def describe(self) -> list[dict[str, Any]]:
        """One JSON-ready row a model. Imports torch to count operations, but loads no weights.

        A model whose files are missing or broken keeps its row, with the reason under `error`.
        """
        return [self._row(name) for name in self._specs]

    def _row(self, name: str) -> dict[str, Any]:
        spec, family = self.spec(name), self.family(name)
        width, height = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
        error: str | None = None
        costs: tuple[float, ...] = ()
        try:
            costs = self.reuse_costs(name)
        except Exception as failure:  # noqa: BLE001  # what is wrong with one model must not cost the others
            error = str(failure)
        return {
            "name": name,
            "family": spec.family,
            "native_width": width,
            "native_height": height,
            "size_multiple": family.size_multiple,
            "render_sizes": [list(size) for size in spec.render_sizes],
            "steps": family.steps if spec.steps is None else spec.steps,
            "guidance_scale": family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
            "loaded": name in self._loaded,
            "default": name in (self.default, self.default_flux),
            "cache": family.cache,
            "branches": [{"branch": branch, "reuse_cost": cost} for branch, cost in enumerate(costs)],
            "samplers": {sampler: list(schedulers) for sampler, schedulers in family.samplers.items()},
            "attention": self._attention(spec),
            "compilation": compilation.unavailable(self.device, spec.offload, spec.quantization),
            "error": error,
        }

    def _attention(self, spec: ModelSpec) -> dict[str, str | None]:
        """Kernel → why it cannot run this model here, None if it can."""
        dtype = spec.dtype or ("float32" if self.device == "cpu" else "float16")
        return {
            attention.SDPA: None,
            **{name: attention.unavailable(name, self.device, dtype) for name in attention.KERNELS},
        }
