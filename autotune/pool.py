"""Worker processes: requests with a time limit; one that dies or hangs is replaced, and costs only its request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from optc.autotune.place import SESSION_SECONDS, Tracker
from optc.autotune.record import OK
from optc.errors import OptcError

START_SECONDS = 120.0
"""A new process imports TVM, on a machine that may be busy."""


_START_HINT = "`optc doctor` checks TVM"


class WorkerStartError(OptcError):
    """Worker processes do not start on this machine."""


@dataclass(frozen=True)
class Settings:
    """How workers run: ``threads`` of a kernel, memory and time a candidate may take.

    Calls cycle through ``weights`` and ``activations`` bytes of data: 0 leaves them warm in the caches.
    """

    target: str
    threads: int
    weights: int = 0
    activations: int = 0
    megabytes: int = 8192
    build_seconds: float = 60.0
    measure_seconds: float = 30.0
    tracker: Tracker | None = None
    """Whose servers run the kernels; None for this machine."""


@dataclass
class Process:
    """One worker; started when it is first asked for something."""

    settings: Settings
    child: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None
    started: float = 0.0
    knows: set[Any] = field(default_factory=set)
    """What the parent has sent to this process: forgotten with it."""

    def start(self) -> None:
        """Start the process unless it runs."""
        if self.child is not None:
            return
        ours, theirs = socket.socketpair()
        settings = self.settings
        command = [sys.executable, "-m", "optc.autotune.worker", str(theirs.fileno()), settings.target]
        command.append(json.dumps(asdict(settings)))
        environment = {**os.environ, "TVM_NUM_THREADS": str(settings.threads), "OMP_NUM_THREADS": "1"}
        # A process group of its own: Ctrl-C is for the parent, which ends its workers by itself.
        self.child = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            cwd=Path.cwd(),
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.started = time.monotonic()
        # A server that a candidate hangs in is free again when its session ends.
        answer = self._receive(START_SECONDS + (2 * SESSION_SECONDS if settings.tracker else 0))
        if answer["state"] != OK:
            where = f" with a server from {settings.tracker.address}" if settings.tracker else ""
            self.stop()
            note = f": {answer['note']}" if answer.get("note") else ""
            raise WorkerStartError(f"a worker process for tuning does not start{where}{note}", hint=_START_HINT)

    def renew(self) -> None:
        """End a process whose session on a server is soon over."""
        if self.settings.tracker and time.monotonic() - self.started > SESSION_SECONDS / 2:
            self.stop()

    def send(self, name: str, **arguments: Any) -> None:
        """Send a request, without waiting for the answer."""
        self.start()
        assert self.connection is not None
        with contextlib.suppress(OSError):  # a process that is gone answers "crash"
            self.connection.send((name, arguments))

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the answer; "crash" or "timeout" for a process that died or took longer than ``seconds``."""
        answer = self._receive(seconds)
        if answer["state"] in ("crash", "timeout"):
            self.stop()
        return answer

    def call(self, name: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.send(name, **arguments)
        return self.receive(seconds)

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self.connection is not None and self.child is not None
        try:
            if not self._wait(seconds):
                return {"state": "timeout", "note": f"no answer within {seconds:.0f} s"}
            answer: dict[str, Any] = self.connection.recv()
            return answer
        except (EOFError, OSError):
            code = self._code()
            # The kernel ends processes that take the memory of the whole machine.
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return {"state": "memory" if name == "SIGKILL" else "crash", "note": f"the process ended: {name}"}

    def _wait(self, seconds: float) -> bool:
        """Wait for an answer; time in which this process was stopped itself, or the machine slept, does not count."""
        assert self.connection is not None
        while seconds > 0:
            start = time.monotonic()
            if self.connection.poll(min(seconds, 1.0)):
                return True
            seconds -= min(time.monotonic() - start, 1.5)
        return False

    def _code(self) -> int | None:
        assert self.child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.child.wait(5)
        return None

    def stop(self) -> None:
        """End the process."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()
        self.child.wait()
        if self.connection is not None:
            self.connection.close()
        self.child, self.connection = None, None
        self.knows.clear()


class Pool:
    """Several workers; they build at the same time, and one measures while the others rest."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings = settings
        self.processes = [Process(settings) for _ in range(max(1, count))]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.stop()
