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
_SILENCE = 3.0  # seconds without a beat after which a rank counts as stopped


class Watch:
    """Publishes this rank's activity from a thread; ``guard`` turns failures of communication into named ranks."""

    def __init__(self, world: distributed.World) -> None:
        self._world = world
        self._step = 0
        self._doing, self._since = "starting", time.monotonic()
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

    def note(self, doing: str) -> None:
        """Say what this rank does from now on."""
        self._doing, self._since = doing, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say that this rank does ``what`` in the block, and waits for others after it."""
        self.note(what)
        yield
        self.note(WAITING)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Raise RankFailureError, naming who is at fault, if communication fails in the block."""
        try:
            yield
        except RuntimeError as error:
            # What fails while this rank computes is its own fault, and says so itself.
            if self._store is None or self._doing != WAITING:
                raise
            self.note(_FAILED)
            raise RankFailureError(
                f"rank {self._world.rank} waited in vain at step {self._step}: {self._diagnose()}",
                hint="with --max-restarts, torchrun starts all ranks again, and they resume from the last checkpoint",
            ) from error

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
            before = self._states()
            time.sleep(_SILENCE)
            after = self._states()
        except RuntimeError as error:
            return f"the store of the run does not answer ({str(error).splitlines()[0]})"
        found = []
        for rank, state in enumerate(after):
            if rank == self._world.rank:
                continue
            if state is None or state == before[rank]:
                doing = f", last seen {state[2]} at step {state[1]}" if state else ""
                found.append(f"rank {rank} is dead or stopped{doing}")
            elif state[2] not in (WAITING, _FAILED):
                found.append(f"rank {rank} hangs: {state[2]} at step {state[1]} for {state[3]:.0f} s")
        return "; ".join(found) or "all other ranks are alive and wait too"

    def _states(self) -> list[Any]:
        return [
            json.loads(self._store.get(str(rank))) if self._store.check([str(rank)]) else None
            for rank in range(self._world.size)
        ]
