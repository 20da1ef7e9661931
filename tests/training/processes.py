"""Processes that tests start, and what must not be left of them."""

import os
import signal
import time
from pathlib import Path


def marked(mark):
    """Processes that carry a mark in their environment."""
    return [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit() and mark in _environment(e)]


def _environment(entry):
    try:
        return (entry / "environ").read_bytes()
    except OSError:  # it ended, or is not ours
        return b""


def environment(mark):
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPTC_TEST_RUN": mark}


def leave_nothing(mark, allowed=()):
    """Wait a little for processes to end; kill those that do not, and fail."""
    deadline = time.monotonic() + 60
    while (left := set(marked(mark)) - set(allowed)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlived their run"
