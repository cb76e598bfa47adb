"""The configured models by name, each loaded when it is first asked for.

Importing this module, and asking it for specs and families, needs neither torch nor diffusers.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .acceleration import attention, compilation
from .base import LoadHooks, ModelSpec
from .errors import LoadFailed, UnknownModel
from .families import FAMILIES
from .families.family import ModelFamily
from .loading.checkpoints import CheckpointFolder, Stamp, stamp_of
from .tuning import profile as profiles

if TYPE_CHECKING:
    from .generation import LoadedModel

_GIB = 2**30


class Registry:
    """Names → specs → loaded models on one `device`. `default` and `default_flux` are names of models.

    `checkpoints`: a folder whose models are served beside `specs`; `refresh` looks at it again, and so does a request
    for an unknown name. A model whose files have changed since it was loaded is loaded anew.
    `memory`: bytes that all loaded weights together may take; None sets no bound. A load that needs room drops the
    models that were used longest ago. `device_memory`: bytes that one model and a request of it may take on a GPU; None
    puts each model there as a whole. `kept_bytes`: of main memory, for the finished runs of each model. `on_stage`
    hears the name of a model that is being loaded and which part of it.
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
        checkpoints: CheckpointFolder | None = None,
        kept_bytes: int = 0,
    ) -> None:
        self._configured = tuple(specs)
        self._checkpoints = checkpoints
        self._specs = {spec.name: spec for spec in self._configured}
        self.unserved: dict[str, str] = {}
        if len(self._specs) != len(self._configured):
            raise ValueError("two models are configured under one name")
        for spec in self._configured:
            if spec.family not in FAMILIES:
                raise ValueError(f"the model {spec.name!r} is of family {spec.family!r}; there are: {list(FAMILIES)}")
        self._defaults: list[ModelSpec] = []
        self._news = False  # models have come, changed or gone since `refresh` was asked last
        if checkpoints is not None:
            checkpoints.scan()
            self._take(checkpoints)
        self.default = self.spec(default).name
        self.default_flux = None if default_flux is None else self.spec(default_flux).name
        self._defaults = [self._specs[name] for name in (self.default, self.default_flux) if name is not None]
        self.device = device
        self.memory = memory
        self.device_memory = device_memory
        self.kept_bytes = kept_bytes
        self.on_stage: Callable[[str, str], None] = lambda name, stage: None
        self._loaded: dict[str, LoadedModel] = {}  # the one used last is last
        self._sizes: dict[str, int] = {}  # bytes that the loaded ones take
        self._stamps: dict[str, Stamp] = {}  # of their files, when they were loaded
        self._costs: dict[tuple[str, Stamp], tuple[float, ...]] = {}

    def refresh(self) -> bool:
        """Look for new, changed and removed files of the folder; whether there were any since the last call.

        Any thread may call it. A default model whose file is gone keeps its name, and its row says why it is not
        available.
        """
        self._look()
        news, self._news = self._news, False
        return news

    def _look(self) -> None:
        if self._checkpoints is not None and self._checkpoints.scan():
            self._take(self._checkpoints)
            self._news = True

    def _take(self, checkpoints: CheckpointFolder) -> None:
        specs, self.unserved = checkpoints.models(self._configured)
        self._specs = {spec.name: spec for spec in [*self._defaults, *specs]}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory, as their files are now."""
        return tuple(name for name in self._loaded if self._current(name))

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
        if name not in self._specs:
            self._look()
        try:
            return self._specs[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._specs, n=3, cutoff=0.4) or list(self._specs)
            raise UnknownModel(f"There is no model {name!r}. Nearest: {', '.join(near)}.") from None

    def family(self, name: str) -> ModelFamily:
        return FAMILIES[self.spec(name).family]

    def get(self, name: str, beside: str | None = None) -> LoadedModel:
        """The model, loaded on first use and kept while there is room. Raises LoadFailed.

        beside: a model in memory that is used together with it, and is not dropped for it.
        """
        from .generation import LoadedModel

        for other in [other for other in self._loaded if not self._current(other)]:
            self._drop(other)
        model = self._loaded.pop(name, None)
        if model is None:
            sizes: list[int] = []

            def room(size: int) -> None:
                self._make_room(name, size, beside)
                sizes.append(size)

            self._stamps[name] = _stamp(self.spec(name))
            hooks = LoadHooks(stage=lambda stage: self.on_stage(name, stage), room=room)
            pipeline = self.family(name).load(self.spec(name), self.device, hooks, self._left_by(beside))
            model = LoadedModel(pipeline, self.kept_bytes)
            self._sizes[name] = sum(sizes)
        self._loaded[name] = model
        return model

    def _current(self, name: str) -> bool:
        """Whether the model in memory is the one that is configured; one whose file has vanished is not given up."""
        spec = self._specs.get(name)
        if spec is None:
            return False
        return self._stamps[name] == _stamp(spec) or (isinstance(spec.source, Path) and not spec.source.exists())

    def _left_by(self, name: str | None) -> int | None:
        """Bytes of the device that a model has beside this one and its work."""
        if self.device_memory is None or name not in self.plans:
            return self.device_memory
        taken: int = max(self.plans[name]["peak_bytes"].values())
        return max(0, self.device_memory - taken)

    def _make_room(self, name: str, size: int, beside: str | None) -> None:
        """Drop models but for `beside`, the one used longest ago first, until `size` more bytes fit."""
        if self.memory is None:
            return
        if size > self.memory:
            raise LoadFailed(
                f"The weights of {name!r} take {size / _GIB:.2f} GiB and the models' memory is "
                f"{self.memory / _GIB:.2f} GiB. Raise WAVESPEED_MODEL_MEMORY, or give the model a smaller dtype or "
                "`offload` in the models file."
            )
        while self.held + size > self.memory:
            oldest = next((other for other in self._loaded if other != beside), None)
            if oldest is None:
                if self.device_memory is not None:
                    return  # the two take turns on the device (`LoadedModel.refined_by`)
                raise LoadFailed(
                    f"The weights of {name!r} take {size / _GIB:.2f} GiB, those of {beside!r} beside them "
                    f"{self.held / _GIB:.2f} GiB, and the models' memory is {self.memory / _GIB:.2f} GiB. Raise "
                    "WAVESPEED_MODEL_MEMORY, or give the models a smaller dtype in the models file."
                )
            self.on_stage(name, f"dropping {oldest} to make room")
            self._drop(oldest)

    def give_up_idle(self, used: Collection[str], missing: int = 0) -> str | None:
        """Drop the model used longest ago that is not among the `used`, and return its name.

        None: there is no other, or the weights of all others together do not take `missing` bytes.
        """
        idle = [name for name in self._loaded if name not in used]
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
        spec = self.spec(name)
        key = (name, _stamp(spec))
        if key not in self._costs:
            self._costs[key] = self.family(name).reuse_costs(spec)
        return self._costs[key]

    def profile(self, name: str, device: str) -> profiles.Profile:
        """What was found for the model by drawing; its fronts are another model's where it has none.

        device: the name of the one whose seconds count.
        """
        known = profiles.read(self.spec(name))
        if not known.fronts:
            known = profiles.borrowed(known, self.family(name).cache, self._counted(name)[0])
        return known.seen_from(device)

    def _counted(self, name: str) -> tuple[tuple[float, ...], str | None]:
        """`reuse_costs`, and why there are none where the model's files are at fault."""
        try:
            return self.reuse_costs(name), None
        except Exception as failure:  # noqa: BLE001  # what is wrong with one model must not cost the others
            return (), str(failure)

    def describe(self) -> list[dict[str, Any]]:
        """One JSON-ready row a model. Imports torch to count operations, but loads no weights.

        A model whose files are missing or broken keeps its row, with the reason under `error`.
        """
        return [self._row(name) for name in self._specs]

    def _row(self, name: str) -> dict[str, Any]:
        spec, family = self.spec(name), self.family(name)
        width, height = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
        costs, error = self._counted(name)
        return {
            "name": name,
            "family": spec.family,
            "native_width": width,
            "native_height": height,
            "size_multiple": family.size_multiple,
            "render_sizes": [list(size) for size in spec.render_sizes],
            "steps": family.steps if spec.steps is None else spec.steps,
            "distilled": spec.distilled,
            "guidance_scale": family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
            "loaded": name in self._loaded,
            "default": name in (self.default, self.default_flux),
            "cache": family.cache,
            "inpaints": error is None and family.inpaints(spec),
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


def _stamp(spec: ModelSpec) -> Stamp:
    """Of the model's files on this machine; those that the hub keeps do not change."""
    return stamp_of(*(path for path in (spec.source, spec.config, *spec.parts.values()) if isinstance(path, Path)))
