"""Kernels on servers of TVM's RPC: a tracker and two servers here compare numbers and time."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import numpy as np
import pytest
from click.testing import CliRunner

from optc.autotune import log, pool
from optc.autotune.place import NoServerError, Tracker
from optc.autotune.pool import Pool, Settings, WorkerStartError
from optc.autotune.record import KEPT, OK
from optc.cli import cli
from optc.errors import UsageError


@pytest.fixture(scope="module")
def tracker():
    pytest.importorskip("tornado")
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker as Tracking

    with ExitStack() as stack:
        running = Tracking("127.0.0.1", port=19190, port_end=19990, silent=True)
        stack.callback(running.terminate)
        for _ in range(2):
            server = Server(
                "127.0.0.1",
                port=20090,
                port_end=20990,
                tracker_addr=("127.0.0.1", running.port),
                key="here",
                silent=True,
            )
            stack.callback(server.terminate)
        here = Tracker("127.0.0.1", running.port, "here")
        while not _registered(here, 2):
            time.sleep(0.1)
        yield here


def _registered(tracker, count):
    """Servers report to their tracker after they have started."""
    try:
        return tracker.servers() == count
    except NoServerError:
        return False


@pytest.fixture
def workers(tracker):
    with Pool(Settings("cpu", threads=1, megabytes=0, tracker=tracker), 2) as several:
        yield several.processes


def prepared(process, kernels):
    assert process.call("load", 60, task="t", variant=0, file=kernels["right"])["state"] == OK
    return process.call("start", 120, task="t", naive=True)


def build(process, decisions=None, variant=0, number=1):
    return process.call("build", 120, task="t", variant=variant, decisions=decisions or {}, number=number)


def test_the_tracker_knows_its_servers(tracker):
    assert tracker.servers() == 2
    with pytest.raises(NoServerError, match="no server 'there'; its servers: here"):
        Tracker(tracker.host, tracker.port, "there").servers()


def test_no_tracker():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NoServerError, match="no tracker answers"):
        Tracker("127.0.0.1", port, "here").servers()


@pytest.mark.parametrize("address", ["somewhere", ":9190", "host:", "host:port", "host:99999"])
def test_addresses(address):
    with pytest.raises(UsageError, match="no address of a tracker"):
        Tracker.parse(address, "here")


def test_candidates_are_compared_and_timed_there(workers, kernels):
    for process in workers:
        started = prepared(process, kernels)
        assert started["state"] == OK and started["seconds"] > 0, started
        built = build(process, {"rows": 3})
        assert built["state"] == OK and built["taken"]["rows"] == 3 and built["error"] < 1
        measured = process.call("measure", 120, task="t", number=1, rounds=3, best=1.0)
        assert measured["state"] == OK
        assert len(measured["seconds"]) == len(measured["baseline"]) >= 2
        assert all(0 < s < 1 for s in measured["seconds"])


def test_wrong_numbers_are_found(workers, kernels):
    process = workers[0]
    prepared(process, kernels)
    assert process.call("load", 60, task="t", variant=1, file=kernels["wrong"])["state"] == OK
    assert build(process, variant=1)["state"] == "wrong"


def test_sessions_are_renewed_before_they_end(workers, kernels, monkeypatch):
    process = workers[0]
    prepared(process, kernels)
    child, process.started = process.child, time.monotonic()
    process.renew()
    assert process.child is child
    monkeypatch.setattr(pool, "SESSION_SECONDS", 0.0)
    process.renew()
    assert process.child is None


def test_a_server_of_another_kind_is_refused(tracker):
    with (
        Pool(Settings("aarch64", threads=1, megabytes=0, tracker=tracker), 1) as several,
        pytest.raises(WorkerStartError, match=r"the server is x86_64.*the target is aarch64"),
    ):
        several.processes[0].start()


def test_the_command_line(tracker, tmp_path):
    import onnx.parser

    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 16, 14, 14] x) => (float[1, 32, 14, 14] y)
        { c = Conv(x, w)  y = Relu(c) }"""
    model = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).standard_normal((32, 16, 1, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    path = tmp_path / "log.jsonl"
    arguments = ["tune", str(tmp_path / "m.onnx"), "--log", str(path), "--trials", "2", "--json"]
    remote = ["--rpc-tracker", tracker.address, "--rpc-key", tracker.key]
    for wrong in (remote, [*remote[:2], "--threads", "1"]):
        assert isinstance(CliRunner().invoke(cli, [*arguments, *wrong]).exception, UsageError)
    done = CliRunner().invoke(cli, [*arguments, *remote, "--threads", "1"])
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.stdout)
    assert outcome["servers"] == 2 and outcome["trials"] == 2 and outcome["untuned"] is None
    records = log.read(path).records
    assert any(r.state == OK for r in records) or all(r.state == KEPT for r in records)
    build = ["compile", arguments[1], "-o", str(tmp_path / "m.optc"), "--log", str(path), "--offline", "--threads", "1"]
    built = CliRunner().invoke(cli, [*build, "--require-tuned"])
    assert built.exit_code == 0, built.output


def test_a_crash_is_told(workers, kernels):
    """The last test: TVM's server does not survive what crashes its session."""
    process = workers[0]
    assert prepared(process, kernels)["state"] == OK
    assert process.call("load", 60, task="t", variant=2, file=kernels["crash"])["state"] == OK
    assert build(process, variant=2)["state"] == "crash"
    assert process.child is None and not process.knows
