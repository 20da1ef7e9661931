"""The ranks of a run: process groups that survive restarts, and the mesh of data x pipeline parallelism."""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig

from optc.errors import OptcError, RankFailureError, UsageError

DEFAULT_TIMEOUT = 600.0
_PAUSE = 0.005
"""Seconds between messages whose latency is measured: what a stage computes at least, if pipelining it is worth it."""
MEASURED_BYTES = 2**22
"""What is sent to measure bandwidths."""
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class World:
    """This rank in the mesh; ranks of one pipeline follow each other: rank = dp_rank * pp + pp_rank.

    The groups are None where there is nobody to talk to.
    """

    rank: int
    pp: int
    dp: int
    device: torch.device
    pp_group: Any = None
    dp_group: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp

    @property
    def pp_rank(self) -> int:
        """Position in the pipeline."""
        return self.rank % self.pp

    @property
    def dp_rank(self) -> int:
        """Which replica of the pipeline this is."""
        return self.rank // self.pp


def launched() -> bool:
    """Whether torchrun, or something that speaks like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def initialize(timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the process group of a run that torchrun started; nothing to do if there is one, or one process only.

    NCCL where every rank has a GPU, gloo otherwise. Keys of the store carry the number of restarts, because ranks of a
    restarted run would find the addresses of those that died.

    Raises UsageError if the environment or the port is wrong, RankFailureError if ranks are missing after ``timeout``.
    """
    if dist.is_initialized() or not launched():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is set, but not {', '.join(missing)}", hint="start with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    delta = datetime.timedelta(seconds=timeout)
    try:
        store = dist.PrefixStore(f"optc/{os.environ.get(_RESTARTS, '0')}", connect(delta, serve=True))
    except dist.DistError as error:
        raise _no_store(error, rank, timeout) from error
    _await_ranks(store, rank, size, timeout)
    dist.init_process_group(
        backend_for(local_device()),
        store=store,
        rank=rank,
        world_size=size,
        timeout=delta,
    )
    atexit.register(_leave)


def _no_store(error: Exception, rank: int, timeout: float) -> OptcError:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        hint = "set another MASTER_PORT, or let torchrun find one: --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
        return UsageError(f"another program uses the port of {place}", hint=hint)
    return RankFailureError(
        f"rank {rank} does not reach rank 0 at {place} within {timeout:.0f} s",
        hint="look at what rank 0 says, and at MASTER_ADDR and MASTER_PORT",
    )


def _await_ranks(store: Any, rank: int, size: int, timeout: float) -> None:
    """Wait until every rank has started; RankFailureError names those that have not."""
    keys = {other: f"started/{other}" for other in range(size)}
    try:
        store.set(keys[rank], "")
        store.wait(list(keys.values()), datetime.timedelta(seconds=timeout))
    except dist.DistError as error:
        try:
            missing = [str(other) for other, key in keys.items() if not store.check([key])]
        except dist.DistError:
            missing = ["0"]  # it holds the store
        raise RankFailureError(
            f"rank {rank} waited {timeout:.0f} s for other ranks to start; missing: {', '.join(missing) or 'none'}",
            hint=f"start {size} ranks, or set WORLD_SIZE to their number",
        ) from error


def end_with_parent() -> None:
    """End this process when torchrun is killed: without it, a rank would write into the next run's checkpoints."""
    _prctl_pr_set_pdeathsig(signal.SIGTERM)  # nothing but on Linux


def connect(timeout: datetime.timedelta, *, serve: bool = False) -> Any:
    """A new connection to the store of this run; with ``serve``, rank 0 holds it if torchrun's agent does not."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=serve and not agent and os.environ["RANK"] == "0",
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The GPU of this local rank if there is one for each, else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cuda", local)
    return torch.device("cpu")


def backend_for(device: torch.device) -> str:
    """The communication library of a kind of device."""
    return "nccl" if device.type == "cuda" else "gloo"


def join(pp: int, dp: int, timeout: float = DEFAULT_TIMEOUT) -> World:
    """Make the mesh; collective over all ranks. UsageError if their number is not ``pp`` times ``dp``."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    initialize(timeout)
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size != pp * dp:
        raise UsageError(
            f"the plan is for pp {pp} x dp {dp} = {pp * dp} ranks, this run has {size}",
            hint=f"torchrun --nproc-per-node {pp * dp} …",
        )
    if size == 1:
        return World(0, 1, 1, device)
    rank = dist.get_rank()
    pipelines = [[replica * pp + stage for stage in range(pp)] for replica in range(dp)]
    replicas = [[replica * pp + stage for replica in range(dp)] for stage in range(pp)]
    return World(rank, pp, dp, device, _group_of(rank, pipelines, timeout), _group_of(rank, replicas, timeout))


def _group_of(rank: int, lists: list[list[int]], timeout: float) -> Any:
    """Create a group for every list of ranks, of which one has ``rank``; return that, None where it is alone."""
    return next(iter(groups_of(rank, lists, timeout).values()), None)


def groups_of(rank: int, lists: list[list[int]], timeout: float) -> dict[tuple[int, ...], Any]:
    """Create a group for every list of several ranks, in the same order on all; return those that ``rank`` is in."""
    mine = {}
    for ranks in lists:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout))
            if rank in ranks:
                mine[tuple(ranks)] = group
    return mine


def agree(value: Any) -> Any:
    """The value of rank 0, on every rank; ``value`` itself where there is one rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def measure_link(repeats: int = 10) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second between ranks 0 and 1. Agreed on; collective.

    The latency is that of a message which both ranks were idle or at work for long before: a rank that sleeps wakes up
    slowly. It is twice that of messages that follow each other.
    """
    device = local_device()

    def exchange(block: torch.Tensor) -> None:
        if dist.get_rank() == 0:
            dist.send(block, dst=1)
            dist.recv(block, src=1)
        elif dist.get_rank() == 1:
            dist.recv(block, src=0)
            dist.send(block, dst=0)

    small, large = torch.zeros(1, device=device), torch.zeros(MEASURED_BYTES // 4, device=device)
    quick = median_seconds(lambda: exchange(small), repeats) / 2
    whole = median_seconds(lambda: exchange(large), repeats) / 2
    latency = statistics.median([_seldom(small) for _ in range(repeats + 2)][2:])
    measured: tuple[float, float] = agree((latency, MEASURED_BYTES / max(whole - quick, 1e-9)))
    return measured


def _seldom(block: torch.Tensor) -> float:
    """Seconds, on rank 0, that ``block`` takes there or back if both ranks have paused; rank 1 tells for how long."""
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank() == 0:
        time.sleep(_PAUSE)
        start = time.perf_counter()
        dist.send(block, dst=1)
        dist.recv(block, src=1)
    elif dist.get_rank() == 1:
        dist.recv(block, src=0)
        if block.is_cuda:
            torch.cuda.synchronize(block.device)
        start = time.perf_counter()
        time.sleep(_PAUSE)
        dist.send(block.fill_(time.perf_counter() - start), dst=0)
    paused = block.item()  # waits for it
    return (time.perf_counter() - start - float(paused)) / 2


def median_seconds(communicate: Callable[[], Any], repeats: int) -> float:
    """Median time of this rank for ``communicate()``, after two rounds that do not count; collective."""
    rounds = []
    for _ in range(repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        communicate()
        if local_device().type == "cuda":
            torch.cuda.synchronize(local_device())
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds[2:])


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as others have to receive it: contiguous, and conjugated or negated in memory, not by a mark."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def gather_tensors(mine: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """All ranks' tensors on the CPU of rank 0, the lowest rank's of equal names; empty on other ranks. Collective."""
    if world.size == 1:
        return {name: tensor.detach().cpu().clone() for name, tensor in mine.items()}
    described = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()]
    lists: list[Any] = [None] * world.size
    dist.all_gather_object(lists, described)
    found: dict[str, torch.Tensor] = {}
    for source, listed in enumerate(lists):
        for name, shape, dtype in listed:
            if name in found:
                continue
            found[name] = torch.empty(0)
            if world.rank == source == 0:
                found[name] = mine[name].detach().cpu().clone()
            elif world.rank == source:
                dist.send(in_memory(mine[name].detach().to(world.device)), dst=0)
            elif world.rank == 0:
                received = torch.empty(shape, dtype=dtype, device=world.device)
                dist.recv(received, src=source)
                found[name] = received.cpu()
    return found if world.rank == 0 else {}
