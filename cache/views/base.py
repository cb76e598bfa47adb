"""A denoiser as strategies see it, and one call of it.

A view holds no state of a run. What runs is always the root's own `forward`, over shortened lists of its own layers
(`patching.shadowed`), so that conditioning, LoRA scales, masks and offload hooks stay the model's business.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from cache import flops
from cache.errors import AlreadyAttached, IncompatibleDenoiser
from cache.patching import shadowed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a denoiser as its caller made it.

    lane: the name of the surrounding `root.cache_context(name)`, by which diffusers pipelines tell calls with text from
        those without where the two run apart; None outside of one.
    injection: what other networks add in it, beside its caller's arguments.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    lane: str | None
    injection: Injection | None = None

    def run(self) -> Any:
        """The root's own forward, with whatever hooks it had; what is injected is computed for it."""
        injected = {} if self.injection is None else self.injection.arguments
        return self.forward(*self.args, **self.kwargs, **injected)

    def given(self, injected: Mapping[str, Any]) -> Call:
        """The call with these arguments in the place of what would be injected."""
        return replace(self, kwargs={**self.kwargs, **injected}, injection=None)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Shapes, dtypes and devices of all tensors, the flags, and which networks inject.

        Calls of unequal signature share nothing.
        """
        acting = () if self.injection is None else self.injection.acting
        return (_signature(self.args), tuple(self.kwargs), _signature(self.kwargs.values()), acting)


def answer_of(form: type[Any], prediction: torch.Tensor | list[torch.Tensor]) -> Any:
    """A denoiser's answer of this form, a tuple or one of diffusers' outputs."""
    return (prediction,) if issubclass(form, tuple) else form(prediction)


def predicted(answer: Any) -> torch.Tensor | None:
    """The prediction in a denoiser's answer: of a list of items (Z-Image), one tensor; None if their shapes differ."""
    found = answer[0]  # of a tuple or of diffusers' output, which can be indexed as one
    if isinstance(found, list):
        return torch.stack(found) if len({item.shape for item in found}) == 1 else None
    prediction: torch.Tensor = found
    return prediction


def with_prediction(answer: Any, prediction: torch.Tensor) -> Any:
    """`answer` with another prediction in it."""
    listed = isinstance(answer[0], list)
    return answer_of(type(answer), list(prediction.unbind()) if listed else prediction)


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else _flags(v) for v in values])


def _flags(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, tuple | list):
        return _signature(value)
    if isinstance(value, Mapping):
        return (tuple(value), _signature(value.values()))
    return None


class _Interception:
    """Stands in for `root.forward`; its presence is the mark that a cache is attached."""

    def __init__(self, forward: Callable[..., Any], handle: Callable[[Call], Any]) -> None:
        functools.update_wrapper(self, forward)  # pipelines read the signature
        self.forward = forward
        self.handle = handle
        self.lane: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle(Call(self.forward, args, kwargs, self.lane))


def _is_intercepted(forward: Any) -> bool:
    """Whether it is an interception, or something wrapped around one."""
    return isinstance(forward, _Interception) or (
        forward is not None and _is_intercepted(getattr(forward, "__wrapped__", None))
    )


@contextmanager
def intercepted(root: nn.Module, handle: Callable[[Call], Any]) -> Iterator[None]:
    """Within the context, each call of `root` is handed to `handle`, whose result is returned to the caller.

    `root.cache_context(name)` is there within the context, whether or not the module brings one.
    Raises AlreadyAttached if the root is intercepted already.
    """
    if _is_intercepted(root.__dict__.get("forward")):
        raise AlreadyAttached(
            f"A cache is already attached to this {type(root).__name__}: leave its context before attaching another, "
            "or load a second model to run two at once."
        )
    interception = _Interception(root.forward, handle)
    own_context = getattr(root, "cache_context", None)

    @contextmanager
    def cache_context(name: str, **details: Any) -> Iterator[None]:
        outer, interception.lane = interception.lane, name
        try:
            if own_context is None:
                yield
            else:
                with own_context(name, **details):
                    yield
        finally:
            interception.lane = outer

    with shadowed([(root, "forward", interception), (root, "cache_context", cache_context)]):
        yield


class Injector(ABC):
    """Networks that add to what a denoiser's layers hand on, ControlNets (Zhang et al. 2023), for one run of it.

    They run before the denoiser, on its own arguments. A cache that skips most of the denoiser has to skip them too: it
    is not given what they add, but an `Injection` that computes it when it is asked for.

    due, made: of each network, the calls that an uncached run would have made by now, and those that were made.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks: tuple[Any, ...] = tuple(networks)
        self.due, self.made = [0] * len(networks), [0] * len(networks)
        self.first: flops.Call | None = None  # arguments of the denoiser's first call with them, on the meta device

    @abstractmethod
    def acting(self) -> tuple[int, ...]:
        """Which of the networks act in the present call. Calls in which unlike ones do share nothing."""

    @abstractmethod
    def compute(self, call: Call, acting: tuple[int, ...]) -> Mapping[str, Any]:
        """What those of the networks add in `call`, by the denoiser's parameters for it."""

    @abstractmethod
    def inputs(self, number: int, call: flops.Call) -> flops.Call:
        """A network's arguments beside such a call of the denoiser, both on the meta device, to be counted."""

    def injection(self, call: Call) -> Injection | None:
        """What is added in `call`; None for nothing."""
        acting = self.acting()
        if not acting:
            return None
        self.first = self.first or flops.on_meta(call.args, call.kwargs)
        for number in acting:
            self.due[number] += 1
        return Injection(self, call, acting)


class Injection:
    """What is added in one call; computed when it is first asked for, and once."""

    def __init__(self, injector: Injector, call: Call, acting: tuple[int, ...]) -> None:
        self.acting = acting
        self._injector, self._call = injector, call
        self._arguments: Mapping[str, Any] | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """By the denoiser's parameters."""
        if self._arguments is None:
            self._arguments = self._injector.compute(self._call, self.acting)
            for number in self.acting:
                self._injector.made[number] += 1
        return self._arguments


Decision = tuple[bool, ...]
"""Of a call: whether it computed; or whether each item of its batch did, where those decide apart."""


class Response(NamedTuple):
    """What a run's sampler makes of the predictions.

    moves: by how much each call's moves the final latent. multistep: whether a step extrapolates from earlier ones.
    """

    moves: Sequence[float]
    multistep: bool = False


Responses = Callable[[], Response | None]
"""Asked once in a run, after its first call; None where nobody knows the sampler."""


def _unknown() -> None:
    return None


class Denoiser:
    """A network that is called once or more a step to predict noise, velocity or sample."""

    injections: ClassVar[tuple[str, ...]] = ()
    """Arguments that change the network between its layers. A call whose caller passes one computes fully."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.responses: Responses = _unknown
        self.injector: Injector | None = None
        self.guided: Callable[[], bool] = lambda: False  # whether the present call has every picture twice in its batch
        parameters = tuple(inspect.signature(type(root).forward).parameters)[1:]
        self._positions = {name: position for position, name in enumerate(parameters)}

    def argument(self, name: str, call: Call) -> Any:
        """What `call` passes for the root's parameter `name`, by keyword or position; None if it does not."""
        if name in call.kwargs:
            return call.kwargs[name]
        position = self._positions.get(name, len(call.args))
        return call.args[position] if position < len(call.args) else None

    def injected(self, call: Call) -> str | None:
        """The first of `injections` that `call` carries."""
        return next((name for name in self.injections if self.argument(name, call) is not None), None)

    def timestep_of(self, call: Call) -> float:
        """The call's timestep (that of the first batch item). Synchronises if it lies on a GPU."""
        timestep = self.argument("timestep", call)
        return float(timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep)

    def sampled(self, responses: Responses) -> Self:
        """The same view for a run of a sampler with these responses."""
        other = copy.copy(self)
        other.responses = responses
        return other

    def injecting(self, injector: Injector | None) -> Self:
        """The same view for a run in which other networks add to this one."""
        other = copy.copy(self)
        other.injector = injector
        return other

    def counted(self, first: flops.Call) -> tuple[Hashable, flops.Call]:
        """The call whose operations stand for all, and what its size is remembered by. first: a run's first call."""
        args, kwargs = first
        return _signature((*args, *kwargs.values())), first

    def guided_by(self, guided: Callable[[], bool]) -> Self:
        """The same view for a run whose calls have every picture twice, without text and with it, where `guided`."""
        other = copy.copy(self)
        other.guided = guided
        return other

    def of_pictures(self, rows: Sequence[T], join: Callable[[T, T], T]) -> tuple[T, ...]:
        """What is known of a call's rows, of its pictures: those of both halves of a guided batch joined."""
        half = len(rows) // 2
        if not half or len(rows) % 2 or not self.guided():
            return tuple(rows)
        return tuple(map(join, rows[:half], rows[half:]))

    def check_is_not_compiled(self) -> None:
        """Raises IncompatibleDenoiser for a network that was compiled as one: it runs what was traced, cut or not."""
        if hasattr(self.root, "_orig_mod") or getattr(self.root, "_compiled_call_impl", None) is not None:
            raise IncompatibleDenoiser(
                "The denoiser was compiled as a whole, and a cache cannot cut it any more: compile its layers apart."
            )

    def intercepted(self, handle: Callable[[Call], Any]) -> AbstractContextManager[None]:
        """Within the context, calls of the root go through `handle`. Raises AlreadyAttached."""
        injector = self.injector
        if injector is None:
            return intercepted(self.root, handle)
        return intercepted(self.root, lambda call: handle(replace(call, injection=injector.injection(call))))
