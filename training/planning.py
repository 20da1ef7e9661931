"""A plan: how a model is split and trained on a cluster, why so, and what else there was."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from optc.errors import OptcError, PartitionError, TrainingError, UsageError
from optc.passes.partition.balance import balance
from optc.passes.partition.chain import segments
from optc.training import cluster as clusters
from optc.training import distributed, faithful, planner
from optc.training.analysis import analyse
from optc.training.capture import Program, capture, source_line
from optc.training.cluster import Cluster
from optc.training.costs import Costs, measure
from optc.training.gradients import measure_reduction
from optc.training.linearize import Layout, linearize
from optc.training.obstacles import obstacles
from optc.training.overhead import measure_overhead, measure_split_overhead
from optc.training.planner import Candidate, Search
from optc.training.roofline import estimate
from optc.training.schedules import Schedule, find

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What the trainer follows. ``cuts`` are the names of the first units of all stages but the first."""

    fingerprint: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    pp: int
    dp: int
    schedule: str
    microbatches: int
    recompute: bool
    data_parallel: str
    cuts: tuple[str, ...]
    seconds: float
    report: tuple[str, ...]
    model: str | None = None
    layout: Layout | None = field(default=None, repr=False, compare=False)
    module: torch.nn.Module | None = field(default=None, repr=False, compare=False)
    best: Candidate | None = field(default=None, repr=False, compare=False)

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp

    @property
    def kind(self) -> Schedule:
        """The schedule's properties."""
        return find(self.schedule)

    def samples(self) -> int:
        """Size of a microbatch."""
        return self.inputs[0][0][0]

    def explain(self) -> str:
        """The choice, its reasons and the alternatives; text of several lines."""
        return "\n".join(self.report)

    def to_json(self) -> str:
        """The plan as JSON, without the captured graph."""
        content = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps({"format": FORMAT, **content}, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json()``."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def from_json(text: str, where: str = "the plan") -> Plan:
        """Read what ``to_json`` made; UsageError names ``where`` if it is something else."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise UsageError(f"{where} was written by another version of optc", hint="make the plan again")
            content["inputs"] = tuple((tuple(shape), dtype) for shape, dtype in content["inputs"])
            content["cuts"], content["report"] = tuple(content["cuts"]), tuple(content["report"])
            plan = Plan(**content)
            find(plan.schedule)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is no plan: {error}", hint="optc split or optc plan write one") from error
        return plan

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan; UsageError if it is missing or damaged."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error

    def bind(self, module: torch.nn.Module) -> Layout:
        """The layout of ``module``, which must be the model that the plan was made for."""
        if self.layout is not None and self.module is module:
            return self.layout
        tensors = itertools.chain(module.parameters(), module.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        examples = tuple(torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in self.inputs)
        program = capture(module, examples)
        if program.fingerprint() != self.fingerprint:
            raise UsageError(
                f"the plan was made for another model than this {type(module).__name__}, or for another mode of it",
                hint="make the plan again; it holds for one model, microbatch shape and version of torch",
            )
        return linearize(program, analyse(program))

    def positions(self, layout: Layout) -> tuple[int, ...]:
        """The cuts as positions in ``layout``."""
        place = {node.name: index for index, node in enumerate(layout.units)}
        return tuple(place[name] for name in self.cuts)


_FIELDS = (
    "fingerprint", "inputs", "pp", "dp", "schedule", "microbatches", "recompute", "data_parallel", "cuts", "seconds",
    "report", "model",
)  # fmt: skip


def plan(
    module: torch.nn.Module,
    example_inputs: Any,
    cluster: Cluster | Mapping[str, Any] | str | os.PathLike[str],
    *,
    costs: str | os.PathLike[str] | Costs = "measured",
    optimizer_state: float = 2.0,
    model: str | None = None,
) -> Plan:
    """Plan how to train ``module`` on ``cluster``.

    Args:
        module: captured in the mode that it is in; not changed.
        example_inputs: one microbatch, a tensor or a tuple of tensors, batch first.
        cluster: see ``optc.training.cluster``.
        costs: ``measured`` on this device, ``roofline`` from a calibration of it, or a file of costs.
        optimizer_state: bytes of optimizer state per byte of weight; 2 for Adam, 1 for momentum, 0 for plain SGD.
        model: where the module came from, kept in the plan.

    Raises:
        UsageError: the cluster or the inputs are wrong.
        UnsupportedModelError: the module cannot be captured.
        PartitionError: no split fits.
    """
    described = clusters.read(cluster)
    if not distributed.launched():
        return _plan(module, example_inputs, described, costs, optimizer_state, model)
    distributed.initialize()
    described = _with_measured(described)
    return _agreed(module, lambda: _plan(module, example_inputs, described, costs, optimizer_state, model))


def costs_of(module: torch.nn.Module, example_inputs: Any, costs: str | os.PathLike[str] = "measured") -> Costs:
    """What each node of ``module`` costs; arguments and errors as of ``plan``. Reuse them for several plans."""
    program = capture(module, example_inputs)
    layout = linearize(program, analyse(program))
    if costs == "measured":
        faithful.check(program, module)
    return _costs(layout, costs)


def _costs(layout: Layout, costs: str | os.PathLike[str]) -> Costs:
    if costs == "measured":
        return measure(layout.program, layout.facts)
    if costs == "roofline":
        return estimate(layout.program, layout.facts)
    return Costs.load(Path(costs), layout.program)


def _agreed(module: torch.nn.Module, make: Callable[[], Plan]) -> Plan:
    """Let rank 0 plan, and give its plan, or its error, to every rank."""
    made: Plan | OptcError | None = None
    if dist.get_rank() == 0:
        try:
            made = make()
        except OptcError as error:
            made = error
        except BaseException as error:
            # The other ranks must not wait for a plan that never comes.
            distributed.agree(TrainingError(f"rank 0 could not plan: {error!r}"))
            raise
    told = distributed.agree(made.to_json() if isinstance(made, Plan) else made)
    if isinstance(told, OptcError):
        raise told
    if isinstance(made, Plan):
        return made
    plan = Plan.from_json(told)
    return replace(plan, layout=plan.bind(module), module=module)


def _with_measured(cluster: Cluster) -> Cluster:
    """Measure what is left open between ranks; collective."""
    if cluster.overhead is None:
        cluster = replace(cluster, overhead=measure_overhead())
    if cluster.split_overhead is None:
        cluster = replace(cluster, split_overhead=measure_split_overhead())
    if cluster.latency is not None and cluster.bandwidth is not None:
        return cluster
    latency, bandwidth = distributed.measure_link()
    return replace(
        cluster,
        latency=latency if cluster.latency is None else cluster.latency,
        bandwidth=bandwidth if cluster.bandwidth is None else cluster.bandwidth,
        reduce_bandwidth=cluster.reduce_bandwidth or measure_reduction(),
    )


def _plan(
    module: torch.nn.Module,
    example_inputs: Any,
    described: Cluster,
    costs: str | os.PathLike[str] | Costs,
    optimizer_state: float,
    model: str | None,
) -> Plan:
    program = capture(module, example_inputs)
    layout = linearize(program, analyse(program))
    if costs == "measured":
        faithful.check(program, module)
    known = costs if isinstance(costs, Costs) else _costs(layout, costs)
    chain = layout.chain(known)
    samples = _samples(program)
    described = _with_possible_sharding(described, module)
    if described.devices > 1:
        _refuse_sparse(layout)
    try:
        found = planner.search(chain, described, samples, optimizer_state)
    except PartitionError as error:
        raise PartitionError("\n".join([error.message, *obstacles(layout)]), hint=error.hint) from error
    best = found.candidates[0]
    return Plan(
        fingerprint=program.fingerprint(),
        inputs=tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in program.examples),
        pp=best.pp,
        dp=best.dp,
        schedule=best.schedule.name,
        microbatches=best.microbatches,
        recompute=best.recompute,
        data_parallel=best.data_parallel,
        cuts=tuple(chain.names[cut] for cut in best.split.cuts),
        seconds=best.seconds,
        report=tuple(_report(layout, known, described, found)),
        model=model,
        layout=layout,
        module=module,
        best=best,
    )


def _with_possible_sharding(cluster: Cluster, module: torch.nn.Module) -> Cluster:
    """FSDP shards weights of one type only."""
    kinds = sorted({str(weight.dtype) for weight in module.parameters() if weight.requires_grad})
    if len(kinds) < 2:
        return cluster
    if cluster.data_parallel == "fsdp":
        raise UsageError(f"FSDP shards weights of one type, not {', '.join(kinds)}", hint='data_parallel = "ddp"')
    return replace(cluster, data_parallel="ddp")


def _refuse_sparse(layout: Layout) -> None:
    """Sparse gradients can be neither reduced over ranks nor gathered."""
    sparse = []
    for unit in layout.units:
        schema = getattr(unit.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        given = dict(zip(names, unit.args, strict=False)) | unit.kwargs
        if given.get("sparse") is True:
            sparse.append(f"{unit.name} ({source_line(unit)})")
    if sparse:
        raise UsageError(
            f"several devices cannot train weights with sparse gradients: {', '.join(sparse[:5])}",
            hint="Embedding(…, sparse=False)",
        )


def _samples(program: Program) -> int:
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in program.examples}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            f"the inputs have batches of {', '.join(map(str, sorted(sizes)))}",
            hint="all inputs are split along their first dimension, which is the batch",
        )
    return sizes.pop()


def _report(layout: Layout, costs: Costs, cluster: Cluster, found: Search) -> list[str]:
    best = found.candidates[0]
    chain = layout.chain(costs)
    devices = [cluster.device(best.schedule.rank_of(s, best.pp), best.pp) for s in range(best.schedule.stages(best.pp))]
    lines = [f"{best.title()}: {best.seconds * 1e3:.2f} ms a step ({costs.source} costs)"]
    if cluster.latency is None or cluster.bandwidth is None:
        link = cluster.link
        lines.append(f"assumed between ranks: {link.latency * 1e6:.0f} us and {link.bandwidth / 1e9:.1f} GB/s")
    if cluster.overhead is None and best.pp > 1:
        lines.append(f"assumed of the runtime: {cluster.action_overhead * 1e6:.0f} us for each action")
    if cluster.split_overhead is None and best.pp > 1:
        microseconds = cluster.weight_overhead * 1e6
        lines.append(f"assumed of zero bubble: {microseconds:.0f} us for each operator whose weights wait")
    lines.append(f"bubble {100 * float(best.timeline.bubble):.1f} %, reduction over dp {best.reduction * 1e3:.2f} ms")
    for rank, need in enumerate(best.memory):
        lines.append(f"rank {rank}: {need / 2**20:.1f} MiB, computes {float(best.timeline.busy(rank)) * 1e3:.2f} ms")
    parts = segments(best.split.cuts, len(chain.names))
    for stage, (start, stop) in enumerate(parts):
        lines.append(
            f"stage {stage} on rank {best.schedule.rank_of(stage, best.pp)}: {chain.names[start]} … "
            f"{chain.names[stop - 1]} ({stop - start} operators, {best.split.seconds[stage] * 1e3:.2f} ms, "
            f"sends {(chain.sent[stop] if stop < len(chain.names) else 0) / 2**20:.2f} MiB)"
        )
    lines += balance(chain, best.split, devices, cluster.link, layout.layer_starts()).lines()
    lines += [
        f"instead, {other.title()}: {100 * (other.score / best.score - 1):+.1f} % per sample"
        for other in found.candidates[1:6]
    ]
    return lines + [f"not {title}: {reason}" for title, reason in found.refused[:5]]
