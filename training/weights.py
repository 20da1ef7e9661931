"""A rank's weights: which stages have which, who shares them, and how they travel under their original names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from optc.errors import CheckpointError
from optc.passes.partition.chain import segments
from optc.training.analysis import written
from optc.training.distributed import World, groups_of
from optc.training.gradients import Owned, full, local
from optc.training.linearize import Layout
from optc.training.schedules import Schedule
from optc.training.stages import Stage


class Weights:
    """The parameters and buffers of this rank's stages under their first original names."""

    def __init__(
        self,
        layout: Layout,
        cuts: Sequence[int],
        schedule: Schedule,
        stages: dict[int, Stage],
        world: World,
        timeout: float,
    ) -> None:
        self._layout, self._stages, self._world = layout, stages, world
        canonical = layout.program.canonical
        parts = segments(cuts, len(layout.units))
        self._homes = {
            weight.name: [
                stage for stage, (start, stop) in enumerate(parts) if any(start <= user < stop for user in weight.users)
            ]
            for weight in layout.weights()
        }
        self.owned: list[Owned] = []
        self.frozen: dict[str, torch.Tensor] = {}
        for number, stage in sorted(stages.items()):
            for name, parameter in stage.body.named_parameters():
                original = canonical.get(name, name)
                if parameter.requires_grad:
                    self.owned.append(Owned(original, parameter, self._homes[original][0] == number))
                else:
                    self.frozen.setdefault(original, parameter)
            for name, buffer in stage.body.named_buffers():
                self.frozen.setdefault(canonical.get(name, name), buffer)
        self.tied = self._tied_groups(schedule, timeout)

    def _tied_groups(self, schedule: Schedule, timeout: float) -> dict[str, Any]:
        """Weights of this rank that several stages have, with the group of the ranks that have them."""
        world = self._world
        trainable = {weight.name for weight in self._layout.weights() if weight.trainable}
        shared = {name: homes for name, homes in self._homes.items() if len(homes) > 1 and name in trainable}
        ranks = {
            name: tuple(sorted({schedule.rank_of(stage, world.pp) for stage in homes}))
            for name, homes in shared.items()
        }
        lists = [
            [replica * world.pp + rank for rank in owners]
            for owners in sorted(set(ranks.values()))
            for replica in range(world.dp)
        ]
        groups = groups_of(world.rank, lists, timeout) if world.size > 1 else {}
        return {
            name: groups.get(tuple(world.dp_rank * world.pp + rank for rank in owners))
            for name, owners in ranks.items()
            if world.pp_rank in owners
        }

    def share_buffers(self) -> None:
        """Give all replicas the first one's buffers that forward writes to, lest they drift apart. Collective over dp.

        What DistributedDataParallel does before each forward pass.
        """
        for buffer in self._changing:
            dist.broadcast(buffer, src=self._world.pp_rank, group=self._world.dp_group)

    @cached_property
    def _changing(self) -> list[torch.Tensor]:
        facts, graph = self._layout.facts, self._layout.program.graph
        changed = {leaf.storage for node in graph.nodes for target in written(node) for leaf in facts[target].leaves}
        names = {
            self._layout.program.canonical.get(node.target, node.target)
            for node in graph.nodes
            if node.op == "get_attr" and any(leaf.storage in changed for leaf in facts[node].leaves)
        }
        return [self.frozen[name] for name in sorted(names & self.frozen.keys())]

    def parameters(self) -> list[torch.nn.Parameter]:
        """What this rank's optimizer updates."""
        return [item.parameter for item in self.owned]

    def rebind(self) -> None:
        """Look parameters up again, after sharding has replaced them."""
        found = {}
        for number, stage in self._stages.items():
            for name, parameter in stage.body.named_parameters():
                found[number, self._layout.program.canonical.get(name, name)] = parameter
        owned = []
        for number, stage in sorted(self._stages.items()):
            for name, _ in stage.body.named_parameters():
                original = self._layout.program.canonical.get(name, name)
                if found[number, original].requires_grad:
                    owned.append(Owned(original, found[number, original], self._homes[original][0] == number))
        self.owned = owned

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight of this rank, sharded ones as they are."""
        return {item.name: item.parameter.detach() for item in reversed(self.owned)} | self.frozen

    def not_finite(self) -> list[str]:
        """Names of the trained weights, of all ranks, that are infinite or NaN somewhere. Collective."""
        mine = [item.name for item in self.owned if not bool(local(item.parameter.detach()).isfinite().all())]
        everyone: list[list[str]] = [mine]
        if self._world.size > 1:
            everyone = [[]] * self._world.size
            dist.all_gather_object(everyone, mine)
        return sorted({name for names in everyone for name in names})

    def whole(self) -> dict[str, torch.Tensor]:
        """Every weight of this rank, whole; empty on replicas other than the first. Collective over dp."""
        whole = {name: full(tensor) for name, tensor in self.tensors().items()}
        return whole if self._world.dp_rank == 0 else {}

    def whole_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of this rank's weights, as ``whole``."""
        whole = {item.name: full(item.parameter.grad) for item in self.owned if item.parameter.grad is not None}
        return whole if self._world.dp_rank == 0 else {}

    def spread(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy loaded ``tensors()`` into all copies of tied weights."""
        with torch.no_grad():
            for item in self.owned:
                if local(tensors[item.name]).data_ptr() != local(item.parameter).data_ptr():
                    local(item.parameter).copy_(local(tensors[item.name]))
            for number in sorted(self._stages):
                for name, buffer in self._stages[number].body.named_buffers():
                    source = tensors[self._layout.program.canonical.get(name, name)]
                    if source.data_ptr() != buffer.data_ptr():
                        buffer.copy_(source)

    def synchronize(self, module: torch.nn.Module) -> bool:
        """Make the weights those of rank 0's ``module``, if they differ between ranks; says whether they did."""
        if self._world.size == 1:
            return False
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        digests: list[Any] = [None] * self._world.size
        dist.all_gather_object(digests, _digest(state))
        if len(set(digests)) == 1:
            return False
        mine: dict[str, list[torch.Tensor]] = {}
        for stage in self._stages.values():
            for name, tensor in [*stage.body.named_parameters(), *stage.body.named_buffers()]:
                mine.setdefault(self._layout.program.canonical.get(name, name), []).append(tensor)
        with torch.no_grad():
            for name, tensor in state.items():
                sent = tensor.detach().to(self._world.device).contiguous().clone()
                dist.broadcast(sent, src=0)
                for copy in mine.get(name, []):
                    copy.copy_(sent)
        return True


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(content.numpy()))
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, owned: Sequence[Owned]) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named ``<weight>/<key>``; numbers become tensors of one element."""
    tensors: dict[str, torch.Tensor] = {}
    for item in reversed(owned):
        for key, value in optimizer.state.get(item.parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{item.name}/{key}"] = value
            elif isinstance(value, int | float):
                tensors[f"{item.name}/{key}:{type(value).__name__}"] = torch.tensor(float(value), dtype=torch.float64)
            elif value is not None:
                raise CheckpointError(f"the optimizer keeps a {type(value).__name__} as '{key}', which cannot be saved")
    return tensors


def empty_optimizer_tensors(
    known: dict[str, tuple[tuple[int, ...], torch.dtype]], owned: Sequence[Owned]
) -> dict[str, torch.Tensor]:
    """Tensors to load this rank's optimizer state into: those in ``known`` that belong to its weights."""
    tensors: dict[str, torch.Tensor] = {}
    parameters = {item.name: item.parameter for item in owned}
    for name, (shape, dtype) in known.items():
        parameter = parameters.get(name.rpartition("/")[0])
        if parameter is None:
            continue
        if tuple(parameter.shape) == shape:
            tensors[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            tensors[name] = torch.zeros(shape, dtype=dtype)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, owned: Sequence[Owned], tensors: dict[str, torch.Tensor]
) -> None:
    """Give ``optimizer`` the state that ``optimizer_tensors`` took; every copy of a tied weight gets its own."""
    for item in owned:
        prefix = f"{item.name}/"
        state = {}
        for name, tensor in tensors.items():
            if not name.startswith(prefix):
                continue
            key, _, number = name.removeprefix(prefix).partition(":")
            state[key] = tensor.clone() if not number else {"int": int, "float": float}[number](tensor.item())
        if state:
            optimizer.state[item.parameter] = state
