"""Chooses data x pipeline parallelism, schedule, microbatches and recomputation by simulating every combination.

All candidates process the same number of samples a step unless ``microbatches`` is fixed, and are compared by the time
of one microbatch of the whole step. Memory decides first: a candidate that does not fit is out, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optc.errors import PartitionError, UsageError
from optc.passes.partition.chain import Chain, Device, segments
from optc.passes.partition.coarsen import coarsen
from optc.passes.partition.memory import MemoryModel
from optc.passes.partition.split import Split, misfit, require_stages, split
from optc.training.cluster import Cluster
from optc.training.schedules import SCHEDULES, Action, Schedule, actions, find, in_flight, peak_bytes
from optc.training.simulate import StageTimes, Timeline, simulate

# Unless a batch is given: enough microbatches to fill most schedules, few enough for a usual batch.
MICROBATCHES_PER_DEVICE = 4
# Memory of several stages on a rank is divided between them in this many attempts.
_ATTEMPTS = 6
# Simulated times this close are alike, since costs are not measured more exactly.
_ALIKE = 0.002


@dataclass(frozen=True)
class Choice:
    """What can be chosen."""

    pp: int
    dp: int
    schedule: Schedule
    microbatches: int
    recompute: bool
    data_parallel: str

    def title(self) -> str:
        """``pp 4 x dp 2, 1F1B, 8 microbatches``."""
        parts = [f"pp {self.pp} x dp {self.dp}"]
        parts += [self.schedule.title] if self.pp > 1 else []
        parts += [f"{self.microbatches} microbatches"]
        parts += ["recomputation"] if self.recompute else []
        parts += [self.data_parallel] if self.dp > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Candidate(Choice):
    """One way to train. ``seconds`` is a simulated step; ``memory`` is in bytes per pipeline rank."""

    split: Split
    timeline: Timeline = field(repr=False)
    seconds: float
    reduction: float
    memory: tuple[float, ...]
    stages: tuple[StageTimes, ...] = field(repr=False)

    @property
    def score(self) -> float:
        """Seconds per microbatch of the whole step."""
        return self.seconds / (self.microbatches * self.dp)


@dataclass(frozen=True)
class Search:
    """Candidates from best to worst, and why the others cannot be."""

    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]


def search(chain: Chain, cluster: Cluster, samples: int, optimizer_state: float) -> Search:
    """Simulate every combination that ``cluster`` leaves open.

    ``samples`` is the size of a microbatch, ``optimizer_state`` the bytes of optimizer state per byte of weight.
    Raises PartitionError if nothing fits, UsageError if what is fixed cannot be combined.
    """
    chain = coarsen(chain)
    found: list[Candidate] = []
    refused: list[tuple[str, str]] = []
    splits: dict[object, Split] = {}
    for choice in _choices(cluster, samples):
        try:
            found.append(_evaluate(chain, cluster, choice, optimizer_state, splits))
        except (PartitionError, UsageError) as error:
            refused.append((choice.title(), error.message))
    if not found:
        reasons = "\n".join(f"  {title}: {reason}" for title, reason in refused[:8])
        raise PartitionError(
            f"no way to train this model on {cluster.devices} devices:\n{reasons}",
            hint="more or larger devices, a smaller microbatch, recompute = true, or fewer fixed choices",
        )
    return Search(tuple(rank(found)), tuple(refused))


def rank(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """From best to worst. Of those as fast as the best of them but for 0.2 %, first what does not split its backward
    pass, whose actions are fewer, then what needs less memory: its backward passes follow sooner on the forward ones.
    """

    def simpler(candidate: Candidate) -> tuple[bool, float, int, float]:
        return candidate.schedule.splits_backward, max(candidate.memory), candidate.pp, candidate.score

    left = sorted(candidates, key=lambda candidate: candidate.score)
    while left:
        alike = [candidate for candidate in left if candidate.score <= left[0].score * (1 + _ALIKE)]
        yield from sorted(alike, key=simpler)
        left = left[len(alike) :]


def _choices(cluster: Cluster, samples: int) -> Iterator[Choice]:
    count = 0
    for pp, dp in _meshes(cluster):
        schedules = [find(cluster.schedule)] if cluster.schedule else list(SCHEDULES)
        if pp == 1 and not cluster.schedule:
            schedules = [find("1F1B")]
        microbatches = _microbatches(cluster, samples, dp)
        if microbatches is None:
            continue
        for schedule in schedules:
            for recompute in [cluster.recompute] if cluster.recompute is not None else [False, True]:
                if recompute and schedule.splits_backward and pp > 1:
                    continue  # a forward pass that is recomputed can go backward once only
                for data_parallel in _data_parallel(cluster, dp):
                    count += 1
                    yield Choice(pp, dp, schedule, microbatches, bool(recompute), data_parallel)
    if not count:
        raise UsageError(
            f"nothing can be planned for {cluster.devices} devices with what is fixed",
            hint="batch must be a multiple of dp times the microbatch; zero-bubble schedules cannot recompute",
        )


def _data_parallel(cluster: Cluster, dp: int) -> list[str]:
    if dp == 1:
        return ["ddp"]
    return [cluster.data_parallel] if cluster.data_parallel else ["ddp", "fsdp"]


def _meshes(cluster: Cluster) -> list[tuple[int, int]]:
    meshes = [(pp, cluster.devices // pp) for pp in range(1, cluster.devices + 1) if cluster.devices % pp == 0]
    meshes = [(p, d) for p, d in meshes if cluster.pp in (None, p) and cluster.dp in (None, d)]
    if not meshes:
        raise UsageError(f"pp {cluster.pp or '?'} x dp {cluster.dp or '?'} is not {cluster.devices} devices")
    return meshes


def _microbatches(cluster: Cluster, samples: int, dp: int) -> int | None:
    """Microbatches of one rank, or None if the batch cannot be divided so."""
    if cluster.microbatches is not None:
        if cluster.batch not in (None, cluster.microbatches * dp * samples):
            return None
        return cluster.microbatches
    whole = cluster.batch or MICROBATCHES_PER_DEVICE * cluster.devices * samples
    return None if whole % (dp * samples) else whole // (dp * samples)


def _evaluate(
    chain: Chain, cluster: Cluster, choice: Choice, optimizer_state: float, splits: dict[object, Split]
) -> Candidate:
    pp, dp, schedule, microbatches = choice.pp, choice.dp, choice.schedule, choice.microbatches
    count = schedule.stages(pp)
    require_stages(chain, count)  # before listing what thousands of stages would do
    ranks = actions(schedule, pp, microbatches)
    per_rank = [cluster.device(rank, pp) for rank in range(pp)]
    # While a pipeline runs, FSDP keeps whole weights and gradients; what it shards are their masters and the optimizer.
    sharded = choice.data_parallel == "fsdp" and dp > 1
    state = 2.0 + ((2.0 + optimizer_state) / dp if sharded else optimizer_state)
    memory = MemoryModel(state, microbatches if pp > 1 else 0, choice.recompute)
    devices = [per_rank[schedule.rank_of(stage, pp)] for stage in range(count)]
    found, needed = _fit(chain, cluster, devices, ranks, schedule, pp, memory, splits)
    times = _times(chain, cluster, found, devices, schedule, choice.recompute)
    if schedule.splits_backward and pp > 1:
        # torch computes all gradients of the first stage together, when those of its weights are due.
        start, stop = segments(found.cuts, len(chain.names))[0]
        whole = _backward(times[0]) - _split_overhead(chain, cluster, start, stop)
        times = (replace(times[0], backward_input=0.0, backward_weight=whole), *times[1:])
    timeline = simulate(schedule, pp, microbatches, times)
    reduction = 0.0
    if dp > 1:
        passes = 3.0 if sharded else 2.0  # FSDP gathers the weights besides
        for rank in range(pp):
            size = sum(_trainable(chain, found, stage) for stage in schedule.stages_of(rank, pp))
            reduction = max(reduction, cluster.reduction_seconds(size, dp, passes))
    return Candidate(
        pp,
        dp,
        schedule,
        microbatches,
        choice.recompute,
        choice.data_parallel,
        found,
        timeline,
        float(timeline.seconds) + reduction,
        reduction,
        needed,
        times,
    )


def _split_overhead(chain: Chain, cluster: Cluster, start: int, stop: int) -> float:
    """What a second action for gradients of weights adds to a stage: itself, and asking for each operator's."""
    asked = int(np.count_nonzero(chain.backward_weight[start:stop]))
    return cluster.action_overhead + asked * cluster.weight_overhead


def _backward(times: StageTimes) -> float:
    return float(times.backward_input + times.backward_weight)


def _trainable(chain: Chain, found: Split, stage: int) -> float:
    start, stop = segments(found.cuts, len(chain.names))[stage]
    # Frozen weights and buffers have no gradients to reduce.
    return chain.bytes_of_weights(start, stop, 1.0) - chain.bytes_of_weights(start, stop, 0.0)


def _fit(
    chain: Chain,
    cluster: Cluster,
    devices: Sequence[Device],
    ranks: Sequence[Sequence[Action]],
    schedule: Schedule,
    pp: int,
    memory: MemoryModel,
    splits: dict[object, Split],
) -> tuple[Split, tuple[float, ...]]:
    """Split so that every rank's stages fit into its memory together; PartitionError if they do not.

    What is best without caps is best under them if it fits, and much faster to find. Else, a rank with one stage is
    exact. Several stages of a rank share its memory: it is first given to each of them, then in shrinking parts until
    their sum fits.
    """
    live = in_flight(ranks, len(devices))
    # Every rank holds at least one microbatch's activations of its units.
    least = chain.bytes_of_weights(0, len(chain.names), memory.state) + float(chain.saved.sum())
    if least > sum(device.memory for device in devices[:pp]):
        raise misfit(chain, devices[:pp], live, memory)
    for share in [math.inf, *(np.linspace(1.0, 0.5, _ATTEMPTS) if len(devices) > pp else [1.0])]:
        shared = tuple(Device(device.speed, device.memory * share) for device in devices)
        key = (shared, *((tuple(live), memory) if share < math.inf else ()))
        if key not in splits:
            splits[key] = split(chain, shared, cluster.link, in_flight=live, memory=memory)
        found = splits[key]
        needed = _needed(chain, found, ranks, schedule, pp, memory)
        if all(need <= devices[rank].memory for rank, need in enumerate(needed)):
            return found, needed
    raise PartitionError(
        f"the stages of a rank need {max(needed) / 2**20:.1f} MiB together, more than its memory",
        hint="use a schedule with one stage per rank",
    )


def _needed(
    chain: Chain,
    found: Split,
    ranks: Sequence[Sequence[Action]],
    schedule: Schedule,
    pp: int,
    memory: MemoryModel,
) -> tuple[float, ...]:
    parts = segments(found.cuts, len(chain.names))
    each = [memory.per_microbatch(chain, start, stop) for start, stop in parts]
    needed = []
    for rank, order in enumerate(ranks):
        fixed = sum(memory.fixed(chain, *parts[stage]) for stage in schedule.stages_of(rank, pp))
        needed.append(peak_bytes(order, fixed, each))
    return tuple(needed)


def _times(
    chain: Chain, cluster: Cluster, found: Split, devices: Sequence[Device], schedule: Schedule, recompute: bool
) -> tuple[StageTimes, ...]:
    link = cluster.link
    overhead = cluster.action_overhead if len(devices) > 1 else 0.0
    splits = schedule.splits_backward and len(devices) > 1
    times = []
    for (start, stop), device in zip(segments(found.cuts, len(chain.names)), devices, strict=True):
        forward = float(chain.forward[start:stop].sum()) / device.speed
        backward = float(chain.backward_input[start:stop].sum()) / device.speed
        weights = float(chain.backward_weight[start:stop].sum()) / device.speed
        last = stop == len(chain.names)
        # Gradients answer the tensors that want them; the rest of the messages go forward alone.
        messages = 0.0 if last else float(chain.messages[stop])
        times.append(
            StageTimes(
                forward + overhead,
                backward + (forward if recompute else 0.0) + overhead,
                weights + (_split_overhead(chain, cluster, start, stop) if splits else 0.0),
                0.0 if last else link.seconds(float(chain.sent[stop]), math.ceil(messages / 2)),
                0.0 if last else link.seconds(float(chain.returned[stop]), math.floor(messages / 2)),
            )
        )
    return tuple(times)
