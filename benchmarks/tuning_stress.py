"""Two tuners and a reader on one log, while tuners are killed with SIGKILL at random moments and started again.

    python benchmarks/tuning_stress.py [--kills 20] [--longest 120] [--seed 0]

After every kill, and many times between, the log is read: every record ever seen must still be there, and no line may
be bad. At the end a last run must go on from the log to a normal end. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from optc.autotune import log
from optc.autotune.record import ALONE, OK

MODEL = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 32, 28, 28] x) => (float[1, 48, 28, 28] y)
    { c = Conv(x, w)  r = Relu(c)  d = Conv<pads = [1, 1, 1, 1]>(r, v)  y = Relu(d) }"""
SHORTEST = 2.0
"""Seconds that a tuner gets at least: it may die before it has started to measure."""


class Reader:
    """Reads the log again and again, and knows every record that it has seen."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen, self.reads = path, set[str](), 0

    def check(self) -> None:
        """Read once; raises RuntimeError if a record is gone or a line is bad."""
        if not self.path.exists():
            return
        found = log.read(self.path)
        lines = {record.line for record in found.records}
        if self.seen - lines or found.bad:
            raise RuntimeError(f"{len(self.seen - lines)} records lost, {len(found.bad)} bad lines")
        self.seen, self.reads = lines, self.reads + 1


def save_model(path: Path) -> None:
    """Write a model of two convolutions."""
    model, generator = onnx.parser.parse_model(MODEL), np.random.default_rng(0)
    for name, shape in (("w", (64, 32, 1, 1)), ("v", (48, 64, 3, 3))):
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)


def start(folder: Path, *limit: str) -> subprocess.Popen[bytes]:
    """Start a tuner."""
    command = [sys.executable, "-m", "optc", "tune", str(folder / "model.onnx"), "--log", str(folder / "log.jsonl")]
    return subprocess.Popen([*command, *limit], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stress(folder: Path, kills: int, longest: float, generator: random.Random) -> dict[str, object]:
    """Kill tuners ``kills`` times, then let one end; returns what was seen."""
    save_model(folder / "model.onnx")
    reader = Reader(folder / "log.jsonl")
    tuners = [start(folder, "--time", "10m") for _ in range(2)]
    ended = 0
    try:
        for _ in range(kills):
            moment = time.monotonic() + generator.uniform(SHORTEST, longest)
            while time.monotonic() < moment:
                reader.check()
                time.sleep(0.05)
            victim = generator.randrange(2)
            ended += tuners[victim].poll() is not None
            tuners[victim].send_signal(signal.SIGKILL)
            tuners[victim].wait()
            reader.check()
            tuners[victim] = start(folder, "--time", "10m")
    finally:
        for tuner in tuners:
            tuner.kill()
            tuner.wait()
    before = len(reader.seen)
    if before < kills:
        raise RuntimeError(f"{before} records in {kills} lives: tuners died before they measured; raise --longest")
    last = start(folder, "--trials", "4").wait()
    reader.check()
    records = log.read(reader.path).records
    measured = Counter((r.workload.key, r.choice) for r in records if r.state == OK and r.where == ALONE)
    return {
        "kills": kills,
        "reads": reader.reads,
        "records": len(reader.seen),
        "of the last run": len(reader.seen) - before,
        "its exit code": last,
        "tuners that had ended by themselves": ended,
        "choices measured alone": len(measured),
        "more than once": sum(count > 1 for count in measured.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=120.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="optc-stress-") as folder:
        print(json.dumps(stress(Path(folder), options.kills, options.longest, random.Random(options.seed))))


if __name__ == "__main__":
    main()
