"""A denoiser as strategies see it, and one call of it.

A view holds no state of a run. What runs is always the root's own `forward`, over shortened lists of its own layers
(`patching.shadowed`), so that conditioning, LoRA scales, masks and offload hooks stay the model's business.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from cache.errors import AlreadyAttached, IncompatibleDenoiser
from cache.patching import shadowed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a denoiser as its caller made it.

    lane: the name of the surrounding `root.cache_context(name)`, by which diffusers pipelines tell calls with text from
        those without where the two run apart; None outside of one.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    lane: str | None

    def run(self) -> Any:
        """The root's own forward, with whatever hooks it had."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Shapes, dtypes and devices of all tensors, and the flags. Calls of unequal signature share nothing."""
        return (_signature(self.args), tuple(self.kwargs), _signature(self.kwargs.values()))


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
    """Arguments that change the network between its layers. A call that has one computes fully."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.responses: Responses = _unknown
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
        return intercepted(self.root, handle)
