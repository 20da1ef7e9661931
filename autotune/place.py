"""Where candidates run: in the process that builds them, or on a server of TVM's RPC.

Timing on a server is the server's own, so the network is not in it. Calls there find their data where the last call
left them: copies cannot take turns within one measurement.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optc.backends.base import Target
from optc.errors import OptcError, UsageError
from optc.runtime.cpu import architecture

SESSION_SECONDS = 240.0
"""After this time a server ends a session, whatever hangs in it; workers ask for a new one well before."""
_CONNECT_SECONDS = 10.0
Kernel = Callable[..., Any]


class SessionLostError(OptcError):
    """The server's end of a session is gone: what it ran last has crashed it, or the network failed."""


class NoServerError(OptcError):
    """No server can be had from the tracker."""


@dataclass(frozen=True)
class Tracker:
    """Servers of one kind, called ``key``, that report to the tracker at ``host:port``."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, address: str, key: str) -> Tracker:
        """Read ``HOST:PORT``; raises UsageError."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UsageError(f"'{address}' is no address of a tracker", hint="HOST:PORT, like 192.168.0.2:9190")
        return cls(host, int(port), key)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"{self.host}:{self.port}"

    def servers(self) -> int:
        """Return how many servers the tracker has; raises NoServerError for none."""
        from tvm import rpc

        try:
            # TVM's client tries again for a minute.
            socket.create_connection((self.host, self.port), timeout=_CONNECT_SECONDS).close()
            summary = rpc.connect_tracker(self.host, self.port).summary()
        except (OSError, RuntimeError, ValueError) as error:
            raise NoServerError(f"no tracker answers at {self.address}: {error}") from error
        keys = [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]
        if self.key not in keys:
            known = ", ".join(sorted(set(keys))) or "none"
            raise NoServerError(f"the tracker at {self.address} has no server '{self.key}'; its servers: {known}")
        return keys.count(self.key)


class Here:
    """This process."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def build(self, function: Any) -> Kernel:
        """Return a PrimFunc, scheduled or not, compiled."""
        from optc.backends.cpu.single import compile_kernel

        kernel: Kernel = compile_kernel(function, self.target)
        return kernel

    def tensor(self, array: np.ndarray) -> Any:
        """Return a copy of ``array`` that kernels can be called with."""
        from optc.backends.cpu.single import aligned

        return aligned(array)

    def seconds(self, kernel: Kernel, calls: Sequence[Sequence[Any]]) -> float:
        """Return the mean time of ``calls``, given by their arguments."""
        start = time.perf_counter()
        for arguments in calls:
            kernel(*arguments)
        return (time.perf_counter() - start) / len(calls)


class Server:
    """A session on a server; it has it for itself until it ends."""

    def __init__(self, target: Target, tracker: Tracker, threads: int) -> None:
        from tvm import rpc

        self.target = target
        self.number = 0
        # As long as other sessions take all servers, this waits.
        client = rpc.connect_tracker(tracker.host, tracker.port)
        self.session = client.request(tracker.key, session_timeout=SESSION_SECONDS)
        self.device = self.session.cpu(0)
        self._check()
        all_big_cores = 1
        self.session.get_function("runtime.config_threadpool")(all_big_cores, threads)

    def _check(self) -> None:
        """Code for another processor does not get there."""
        try:
            triple = str(self.session.get_function("target.llvm_get_system_triple")())
            cpu = str(self.session.get_function("target.llvm_get_system_cpu")())
        except Exception:  # a server with TVM's runtime alone has no LLVM to ask
            return
        if architecture(triple) != architecture(self.target.triple):
            raise UsageError(f"the server is {triple}; the target is {self.target.triple}", hint="name its --target")
        if self.target.native and cpu != self.target.cpu:
            raise UsageError(f"the server's CPU is {cpu}, this one {self.target.cpu}", hint=f"--target {cpu}")

    def build(self, function: Any) -> Kernel:
        """Compile here, load there."""
        from optc.backends.cpu.single import compile_library

        self.number += 1
        with tempfile.TemporaryDirectory(prefix="optc-rpc-") as folder:
            path = Path(folder) / f"kernel{self.number}.so"
            path.write_bytes(compile_library(function, self.target))
            kernel: Kernel = self._there(lambda: self._load(path))
            return kernel

    def _load(self, path: Path) -> Kernel:
        self.session.upload(str(path))
        module = self.session.load_module(path.name)
        self.session.remove(path.name)
        return _Loaded(self, module)

    def tensor(self, array: np.ndarray) -> Any:
        """Return a copy of ``array`` on the server."""
        import tvm

        return self._there(lambda: tvm.runtime.tensor(np.ascontiguousarray(array), self.device))

    def seconds(self, kernel: Kernel, calls: Sequence[Sequence[Any]]) -> float:
        """Return the mean time of as many calls with the first arguments; the server also runs one before."""
        assert isinstance(kernel, _Loaded)
        timer = kernel.module.time_evaluator("main", self.device, number=len(calls), repeat=1)
        return float(self._there(lambda: timer(*calls[0]).mean))

    def _there(self, action: Callable[[], Any]) -> Any:
        """Do what the server does; a failure of it with the session gone is the session's."""
        try:
            return action()
        except Exception as error:
            try:
                self.session.get_function("runtime.NumThreads")()
            except Exception:
                raise SessionLostError("the server's session ended") from error
            raise


@dataclass(frozen=True)
class _Loaded:
    """A kernel on a server."""

    place: Server
    module: Any

    def __call__(self, *arguments: Any) -> None:
        self.place._there(lambda: self.module["main"](*arguments))


Place = Here | Server
