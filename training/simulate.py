"""How long a schedule takes: every action starts when its rank is free and what it needs has arrived.

Numbers are only added and compared, so that integers and fractions give exact results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optc.training.schedules import Action, Schedule, actions


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch; ``send`` and ``send_back`` to the next stage and back."""

    forward: Any
    backward_input: Any
    backward_weight: Any
    send: Any = 0
    send_back: Any = 0

    def seconds(self, kind: str) -> Any:
        """Duration of an action of this stage."""
        if kind == "F":
            return self.forward
        if kind == "I":
            return self.backward_input
        return self.backward_weight if kind == "W" else self.backward_input + self.backward_weight


@dataclass(frozen=True)
class Event:
    """An action of a rank and when it ran."""

    rank: int
    action: Action
    start: Any
    stop: Any


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    events: tuple[Event, ...] = field(repr=False)
    ranks: int

    @property
    def seconds(self) -> Any:
        """From the first action to the end of the last."""
        return max(event.stop for event in self.events)

    def busy(self, rank: int) -> Any:
        """Seconds in which ``rank`` computes."""
        return sum(event.stop - event.start for event in self.events if event.rank == rank)

    @property
    def bubble(self) -> Any:
        """Share of all ranks' time in which they wait."""
        whole = self.seconds * self.ranks
        return (whole - sum(self.busy(rank) for rank in range(self.ranks))) / whole if whole else 0


def simulate(schedule: Schedule, pp: int, microbatches: int, stages: Sequence[StageTimes]) -> Timeline:
    """Run ``schedule`` with these times of its stages. UsageError if it does not work with these numbers."""
    ranks = actions(schedule, pp, microbatches)
    last = len(stages) - 1
    done: dict[tuple[str, int, int], Any] = {}
    clock: list[Any] = [0] * pp
    events: list[Event] = []
    following = [0] * pp
    remaining = sum(map(len, ranks))

    def arrival(action: Action, rank: int) -> Any:
        """When the input of ``action`` is there; None while its producer has not run."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            if stage == 0:
                return 0
            key, source, delay = ("F", stage - 1, microbatch), stage - 1, stages[stage - 1].send
        elif action.kind in "BI":
            if stage == last:
                return done.get(("F", stage, microbatch))
            key, source, delay = ("B", stage + 1, microbatch), stage + 1, stages[stage].send_back
        else:
            return done.get(("B", stage, microbatch))
        if key not in done:
            return None
        return done[key] if schedule.rank_of(source, pp) == rank else done[key] + delay

    while remaining:
        before = remaining
        for rank, order in enumerate(ranks):
            while following[rank] < len(order):
                action = order[following[rank]]
                ready = arrival(action, rank)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                stop = start + stages[action.stage].seconds(action.kind)
                clock[rank] = stop
                if action.kind != "W":
                    done["F" if action.kind == "F" else "B", action.stage, action.microbatch] = stop
                events.append(Event(rank, action, start, stop))
                following[rank] += 1
                remaining -= 1
        assert remaining < before, f"{schedule.name} waits for itself"
    return Timeline(tuple(events), pp)
