"""How ranks find each other, and what they do when nobody is left to look after them."""

import json
import socket
import subprocess
import sys
import uuid

import pytest
from processes import environment, leave_nothing

from optc.errors import RankFailureError, UsageError
from optc.training import distributed

LAUNCHER = """
import os, time
from optc.training.distributed import end_with_parent
if os.fork() == 0:
    end_with_parent()
    print("ready", flush=True)
time.sleep(600)
"""


def test_a_rank_does_not_outlive_its_launcher():
    mark = uuid.uuid4().hex
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=environment(mark)
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    leave_nothing(mark.encode())


@pytest.fixture
def port(monkeypatch):
    """A free port, and the environment of one of two ranks that meet there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": number}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return number


def test_ranks_that_do_not_start_are_named(port, monkeypatch):
    with pytest.raises(RankFailureError, match="rank 0 waited 1 s for other ranks to start; missing: 1"):
        distributed.initialize(1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RankFailureError, match=f"rank 1 does not reach rank 0 at localhost:{port} within 1 s"):
        distributed.initialize(1)


def test_a_port_in_use_is_an_error(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(UsageError, match="another program uses the port"):
            distributed.initialize(5)


def test_an_incomplete_environment_is_an_error(port, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UsageError, match="WORLD_SIZE is set, but not MASTER_PORT"):
        distributed.initialize(1)


def test_links_and_reductions_are_measured_alike_on_all_ranks(ranks):
    status, output = ranks(2, "measure_links.py")
    assert status == 0, output[-3000:]
    first, second = (json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert first == second
    latency, bandwidth, reduction = first
    assert 0.02 <= latency < 0.2
    # In a ring of two, each rank sends as many bytes as there are.
    assert 0 < reduction <= distributed.MEASURED_BYTES / 0.05 < bandwidth
