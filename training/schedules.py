"""Pipeline schedules as data: which rank computes what in which order, read off torch's own schedules."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from optc.errors import UsageError

STAGES_PER_RANK = 2  # of the schedules that give a rank several


@dataclass(frozen=True)
class Schedule:
    """``name`` is torch's. A looped schedule gives a rank stages pp apart, a V-shaped one mirrors them."""

    name: str
    title: str
    stages_per_rank: int = 1
    v_shaped: bool = False
    # Gradients of inputs and of weights are computed apart.
    splits_backward: bool = False

    def stages(self, pp: int) -> int:
        """Number of stages of ``pp`` ranks."""
        return pp if pp == 1 else pp * self.stages_per_rank

    def rank_of(self, stage: int, pp: int) -> int:
        """The pipeline rank that ``stage`` runs on."""
        if self.v_shaped and stage >= pp > 1:
            return 2 * pp - 1 - stage
        return stage % pp

    def stages_of(self, rank: int, pp: int) -> list[int]:
        """The stages of a rank, increasing."""
        return [stage for stage in range(self.stages(pp)) if self.rank_of(stage, pp) == rank]


SCHEDULES = (
    Schedule("GPipe", "GPipe"),
    Schedule("1F1B", "1F1B"),
    Schedule("Interleaved1F1B", "interleaved 1F1B", STAGES_PER_RANK),
    Schedule("InterleavedZeroBubble", "interleaved zero bubble", STAGES_PER_RANK, splits_backward=True),
    Schedule("ZBVZeroBubble", "ZBV", STAGES_PER_RANK, v_shaped=True, splits_backward=True),
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_NAME = {_plain(alias): schedule for schedule in SCHEDULES for alias in (schedule.name, schedule.title)}
_BY_NAME |= {"interleaved": SCHEDULES[2], "zerobubble": SCHEDULES[3]}


def find(name: str) -> Schedule:
    """The schedule called ``name``, in any spelling; UsageError lists those there are."""
    schedule = _BY_NAME.get(_plain(name))
    if schedule is None:
        raise UsageError(f"there is no schedule '{name}'", hint=f"schedules: {', '.join(s.name for s in SCHEDULES)}")
    return schedule


class Action(NamedTuple):
    """``kind`` is F (forward), B (backward), I (gradients of inputs) or W (gradients of weights)."""

    kind: str
    stage: int
    microbatch: int


@functools.lru_cache(maxsize=256)
def actions(schedule: Schedule, pp: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank computes, in order. UsageError if the schedule does not work with these numbers."""
    if pp == 1:
        return (tuple(Action(kind, 0, index) for index in range(microbatches) for kind in "FB"),)
    if microbatches < pp and schedule.name != "GPipe":
        raise UsageError(f"{schedule.title} over {pp} ranks needs at least {pp} microbatches, not {microbatches}")
    if schedule.stages_per_rank == 1:
        return tuple(_single(schedule, pp, microbatches, rank) for rank in range(pp))
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    try:
        ranks = get_schedule_ops(schedule.name, pp, microbatches, num_stages_per_rank=schedule.stages_per_rank)
    except ValueError as error:
        raise UsageError(f"{schedule.title} over {pp} ranks with {microbatches} microbatches: {error}") from error
    return tuple(
        tuple(
            Action(action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in rank
            if action is not None and action.computation_type.value in "FBIW"
        )
        for rank in ranks
    )


def _single(schedule: Schedule, pp: int, microbatches: int, rank: int) -> tuple[Action, ...]:
    """What torch's GPipe and 1F1B run; the order that torch reports for 1F1B's last rank starts at microbatch 1."""
    warmup = microbatches if schedule.name == "GPipe" else pp - rank
    forward = [Action("F", rank, index) for index in range(microbatches)]
    backward = [Action("B", rank, index) for index in range(microbatches)]
    order, forward = forward[:warmup], forward[warmup:]
    for index, action in enumerate(backward):
        order.append(action)
        order += forward[index : index + 1]
    return tuple(order)


def in_flight(ranks: Sequence[Sequence[Action]], stages: int) -> list[int]:
    """The most microbatches whose activations each stage holds at once."""
    live, peak = [0] * stages, [0] * stages
    for rank in ranks:
        for action in rank:
            if action.kind == "F":
                live[action.stage] += 1
                peak[action.stage] = max(peak[action.stage], live[action.stage])
            elif action.kind in "BW":
                live[action.stage] -= 1
    return peak


def peak_bytes(rank: Sequence[Action], fixed: float, per_microbatch: Sequence[float]) -> float:
    """Most bytes that a rank holds at once: ``fixed`` plus ``per_microbatch[stage]`` for each activation alive."""
    live = peak = fixed
    for action in rank:
        if action.kind == "F":
            live += per_microbatch[action.stage]
            peak = max(peak, live)
        elif action.kind in "BW":
            live -= per_microbatch[action.stage]
    return peak
