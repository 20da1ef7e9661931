"""Who holds up the others: each rank says what it does, and whoever gives up waiting reads what the others said."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from optc.errors import RankFailureError
from optc.training import distributed

WAITING = "waiting for other ranks"
_FAILED = "failed"
_BEAT = 0.5  # seconds
_SETTLE = 3.0  # seconds in which ranks that wait as well find out that they do so in vain
_SILENCE = 10.0  # seconds without a beat after which a rank counts as stopped


class Watch:
    """Publishes this rank's activity from a thread; ``guard`` turns failures of communication into named ranks."""

    def __init__(self, world: distributed.World) -> None:
        self._world = world
        self._step = 0
        self._doing, self._talks, self._since = "starting", False, time.monotonic()
        self._stop = threading.Event()
        self._store: Any = None
        if world.size > 1 and "MASTER_ADDR" in os.environ:
            prefix = f"optc/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            # A connection of its own: one that the main thread waits on cannot be written to.
            self._store = dist.PrefixStore(prefix, distributed.connect(datetime.timedelta(seconds=60)))
            threading.Thread(target=self._beat, name="optc watch", daemon=True).start()

    def close(self) -> None:
        """Stop publishing."""
        self._stop.set()

    def at_step(self, step: int) -> None:
        """Note the number of the step that begins."""
        self._step = step

    def note(self, doing: str, *, talks: bool = False) -> None:
        """Say what this rank does from now on; with ``talks``, other ranks can make it fail."""
        self._doing, self._talks, self._since = doing, talks or doing == WAITING, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str, *, talks: bool = False) -> Iterator[None]:
        """Say that this rank does ``what`` in the block, and waits for others after it."""
        self.note(what, talks=talks)
        yield
        self.note(WAITING)

    @contextlib.contextmanager
    def guard(self, what: str, *, talks: bool = True) -> Iterator[None]:
        """Say that this rank does ``what``; RankFailureError, naming who is at fault, if communication fails."""
        self.note(what, talks=talks)
        try:
            yield
        except RuntimeError as error:
            # What fails while this rank computes is its own fault, and says so itself.
            if self._store is None or not self._talks:
                raise
            self.note(_FAILED)
            raise RankFailureError(
                f"rank {self._world.rank} waited in vain at step {self._step}: {self._diagnose()}",
                hint="with --max-restarts, torchrun starts all ranks again, and they resume from the last checkpoint",
            ) from error
        self.note("between steps")

    def _beat(self) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            state = [count, self._step, self._doing, time.monotonic() - self._since]
            try:
                self._store.set(str(self._world.rank), json.dumps(state))
            except RuntimeError:  # the store is gone, and with it the run
                return
            self._stop.wait(_BEAT)

    def _diagnose(self) -> str:
        try:
            before = after = self._states()
            began = time.monotonic()
            while (waited := time.monotonic() - began) < _SILENCE:
                time.sleep(_BEAT)
                after = self._states()
                if waited > _SETTLE and not self._silent(before, after):
                    break
        except RuntimeError as error:
            return f"the store of the run does not answer ({str(error).splitlines()[0]})"
        found = []
        for rank in self._silent(before, after):
            doing = f", last seen {after[rank][2]} at step {after[rank][1]}" if after[rank] else ""
            found.append(f"rank {rank} is dead or stopped{doing}")
        for rank in sorted({*range(self._world.size)} - {self._world.rank, *self._silent(before, after)}):
            _, step, doing, seconds = after[rank]
            if doing not in (WAITING, _FAILED):
                found.append(f"rank {rank} hangs: {doing} at step {step} for {seconds:.0f} s")
        return "; ".join(found) or "all other ranks are alive and wait too"

    def _silent(self, before: list[Any], after: list[Any]) -> list[int]:
        """Other ranks of which nothing was heard between two looks at their states."""
        others = (rank for rank in range(self._world.size) if rank != self._world.rank)
        return [rank for rank in others if after[rank] is None or after[rank] == before[rank]]

    def _states(self) -> list[Any]:
        return [
            json.loads(self._store.get(str(rank))) if self._store.check([str(rank)]) else None
            for rank in range(self._world.size)
        ]
