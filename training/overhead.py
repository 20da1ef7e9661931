"""What the pipeline runtime itself takes for an action, measured with stages that compute next to nothing.

Without it, simulated steps are too short by 1 % where stages take 80 ms, and by more where they take less.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch import fx

from optc.training.distributed import DEFAULT_TIMEOUT, World, agree, groups_of, local_device
from optc.training.engine import Engine
from optc.training.randomness import Clock
from optc.training.schedules import find
from optc.training.stages import Stage, enter, leave
from optc.training.watch import Watch

_MICROBATCHES = 24
_WIDTH = 16


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
