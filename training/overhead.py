"""What the pipeline runtime itself takes for an action, measured with stages that compute next to nothing.

Without it, simulated steps are too short by 1 % where stages take 80 ms, and by more where they take less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from optc.training.backward import Paths, input_gradients, weight_gradients
from optc.training.distributed import DEFAULT_TIMEOUT, World, agree, groups_of, local_device
from optc.training.engine import Engine
from optc.training.randomness import Clock
from optc.training.schedules import find
from optc.training.stages import Stage, enter, leave
from optc.training.watch import Watch

_MICROBATCHES = 24
_WIDTH = 16
_LAYERS = 8
_PAUSE = 0.002


def measure_overhead(repeats: int = 11) -> float:
    """Seconds that dispatch, autograd and handing tensors over take for one forward or backward action.

    Of a step of a pipeline over ranks 0 and 1 whose stages do next to nothing. Under GPipe it lasts as long as its
    microbatches and one more take on one rank. Zero on GPUs: processors work ahead of them. Agreed on; collective.
    """
    if local_device().type == "cuda":
        return 0.0
    rank, seconds = dist.get_rank(), 0.0
    for group in groups_of(rank, [[0, 1]], DEFAULT_TIMEOUT).values():
        step = _step_seconds(World(rank, 2, 1, local_device(), group), repeats)
        seconds = step / (2 * (_MICROBATCHES + 1))
        dist.destroy_process_group(group)
    measured: float = agree(seconds)
    return measured


def measure_split_overhead(repeats: int = 11) -> float:
    """Seconds that a backward pass takes more in two parts than in one, for each operator with weights.

    Of layers whose gradients pause for 2 ms, after which caches are as cold as after a large operator. Zero on GPUs:
    processors work ahead of them. Agreed on; collective.
    """
    seconds = 0.0
    if local_device().type != "cuda" and dist.get_rank() == 0:
        seconds = _split_seconds(repeats)
    measured: float = agree(seconds)
    return measured


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        time.sleep(_PAUSE)
        return gradients[0]


def _split_seconds(repeats: int) -> float:
    """Median difference of runs in turns, after two that do not count; a layer's."""
    weights = [torch.nn.Parameter(torch.eye(_WIDTH)) for _ in range(_LAYERS)]
    inputs, given, paths = torch.zeros(1, _WIDTH, requires_grad=True), torch.ones(1, _WIDTH), Paths()

    def outputs() -> torch.Tensor:
        result = inputs
        for weight in weights:
            result = _Pause.apply(result) @ _Pause.apply(weight)
        return result

    def in_two_parts(result: torch.Tensor) -> None:
        weight_gradients(input_gradients([result], [given], [inputs], weights, paths)[1])

    def seconds(run: Callable[[torch.Tensor], None]) -> float:
        result = outputs()
        start = time.perf_counter()
        run(result)
        return time.perf_counter() - start

    rounds = [seconds(in_two_parts) - seconds(lambda result: result.backward(given)) for _ in range(repeats + 2)]
    return max(statistics.median(rounds[2:]), 0.0) / _LAYERS


def _step_seconds(world: World, repeats: int) -> float:
    """Median time of a step, after two that do not count."""
    clock = Clock(seed=0)
    stages = {world.rank: _stage(world, clock)}
    idle = Watch(World(0, 1, 1, world.device))
    engine = Engine(find("GPipe"), _MICROBATCHES, world, stages, dict(stages), clock, idle)
    batch = torch.zeros(_MICROBATCHES, _WIDTH, device=world.device)
    rounds = []
    for _ in range(repeats + 2):
        dist.barrier(world.pp_group)
        start = time.perf_counter()
        engine.run((batch,), lambda output, number: output.sum())
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds[2:])


def _stage(world: World, clock: Clock) -> Stage:
    """A small product between the tensors that come in and go out, as in any stage."""
    graph = fx.Graph()
    inputs = graph.call_function(enter, (graph.placeholder("x"),))
    graph.output(graph.call_function(leave, (graph.call_module("layer", (inputs,)),)))
    body = fx.GraphModule({"layer": torch.nn.Linear(_WIDTH, _WIDTH, device=world.device)}, graph)
    like = torch.empty(1, _WIDTH, device="meta")
    received = like if world.rank == 0 else like.clone().requires_grad_()
    sent = like.clone().requires_grad_()
    return Stage(body, (received,), (sent,), clock, device=world.device, dtype=None, recompute=False)
