"""When a reuse is allowed: the interval between compute calls, and the window along the noise schedule."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE_SCHEDULE = 1000  # progress units, whatever the number of training timesteps


def progress(timestep: float, num_train_timesteps: int = 1000) -> float:
    """How far the noise schedule has come at `timestep` (training timesteps): 0 pure noise, 1000 finished."""
    return WHOLE_SCHEDULE - timestep * WHOLE_SCHEDULE / num_train_timesteps


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the schedule, in progress units and both ends included, in which a call may reuse."""

    start: int = 0
    end: int = WHOLE_SCHEDULE

    @property
    def is_whole(self) -> bool:
        """Nothing is excluded, so that the timestep need not be read (from a GPU, that is a synchronisation)."""
        return self.start <= 0 and self.end >= WHOLE_SCHEDULE

    def contains(self, timestep: float, num_train_timesteps: int = 1000) -> bool:
        return self.start <= progress(timestep, num_train_timesteps) <= self.end


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every `interval`-th call computes; counted from the last computed call, whatever made that one compute.

    In an uninterrupted run these are the calls 0, N, 2N, …: ⌈calls / N⌉ of them.
    """

    interval: int

    def reuses(self, age: int) -> bool:
        """Whether the call that comes `age` calls after the last computed one (1 = the next) reuses."""
        return age < self.interval
