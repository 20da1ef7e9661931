"""Gradients between the backward pass and the optimizer: sums over replicas and tied copies, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from optc.training.distributed import MEASURED_BYTES, World, agree, local_device, median_seconds

_BUCKET = 2**25  # bytes


@dataclass(frozen=True)
class Owned:
    """A stage's own copy of a weight. ``counts`` is false for copies that the norm of all gradients leaves out."""

    name: str
    parameter: torch.nn.Parameter
    counts: bool


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, or the tensor itself; collective over the ranks that share it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def average_over_replicas(owned: Iterable[Owned], world: World) -> None:
    """Replace gradients by their mean over dp, several small ones in one reduction.

    DistributedDataParallel would do so during the last backward pass, but it follows one module through one backward
    pass: it can serve neither the several stages of a rank nor gradients of inputs and of weights that come apart.
    """
    for bucket in _buckets([item.parameter.grad for item in owned if item.parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=world.dp_group)
        flat /= world.dp
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def measure_reduction(repeats: int = 10) -> float:
    """Bytes per second of each rank's link while all of them average gradients, as they do after a step.

    They may share cores and cables, and copy what they send: over gloo that is half of what one link can do. Agreed
    on; collective.
    """
    ranks, device = dist.get_world_size(), local_device()
    weights = [torch.nn.Parameter(torch.zeros(MEASURED_BYTES // 16, device=device)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    owned = [Owned(str(number), weight, counts=True) for number, weight in enumerate(weights)]
    world = World(dist.get_rank(), 1, ranks, device)
    seconds = median_seconds(lambda: average_over_replicas(owned, world), repeats)
    measured: float = agree(2 * (ranks - 1) / ranks * MEASURED_BYTES / seconds)
    return measured


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, together little more than _BUCKET bytes: what is copied to be sent stays small."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= _BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def sum_tied(owned: Iterable[Owned], groups: dict[str, Any]) -> None:
    """Give every copy of a tied weight the sum of all copies' gradients.

    ``groups`` names the tied weights of this rank, in the same order on all ranks, with the process group of the other
    ranks that have copies, or None.
    """
    copies: dict[str, list[torch.nn.Parameter]] = {name: [] for name in groups}
    for item in owned:
        if item.name in copies:
            copies[item.name].append(item.parameter)
    for name, group in groups.items():
        total = torch.zeros_like(local(copies[name][0].detach()))
        for parameter in copies[name]:
            if parameter.grad is not None:
                total += local(parameter.grad)
        if group is not None:
            dist.all_reduce(total, group=group)
        for parameter in copies[name]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).copy_(total)


def global_norm(owned: Iterable[Owned], world: World, *, sharded: bool) -> float:
    """Euclidean norm of all gradients of the model, tied weights counted once. Collective."""
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    for item in owned:
        if item.counts and item.parameter.grad is not None:
            gradient = local(item.parameter.grad)
            parts = (gradient.real, gradient.imag) if gradient.is_complex() else (gradient,)
            squares += sum(part.double().square().sum() for part in parts)
    if world.pp_group is not None:
        dist.all_reduce(squares, group=world.pp_group)
    if sharded and world.dp_group is not None:
        dist.all_reduce(squares, group=world.dp_group)
    return math.sqrt(float(squares))


def scale(owned: Iterable[Owned], factor: float) -> None:
    """Multiply all gradients by ``factor``."""
    for item in owned:
        if item.parameter.grad is not None:
            local(item.parameter.grad).mul_(factor)


class LossScaler:
    """Scales fp16 losses so that small gradients survive; halves on overflow, doubles after ``interval`` good steps."""

    def __init__(self, initial: float = 2.0**16, interval: int = 2000) -> None:
        self.value, self._interval, self._good = initial, interval, 0

    def update(self, finite: bool) -> None:
        """Adapt to whether the last gradients were finite."""
        if not finite:
            self.value, self._good = max(self.value / 2, 1.0), 0
            return
        self._good += 1
        if self._good == self._interval:
            self.value, self._good = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """For checkpoints."""
        return {"value": self.value, "good": self._good}

    def restore(self, state: dict[str, float]) -> None:
        """Back to ``state()``."""
        self.value, self._good = state["value"], int(state["good"])
