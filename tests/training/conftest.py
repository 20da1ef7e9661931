import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Models are shared with the scripts that ranks run.
sys.path.insert(0, str(HERE))


class Run:
    """A finished or running torchrun: its output, and the processes it started."""

    def __init__(self, process, mark, log):
        self.process, self.mark, self.log = process, mark, log

    def wait(self, timeout=400):
        self.process.wait(timeout=timeout)
        return self

    @property
    def output(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self):
        """Processes that still carry the mark of this run."""
        return [pid for pid in _processes() if self.mark.encode() in _environment(pid)]


def _processes():
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it ended, or is not ours
        return b""


@pytest.fixture
def torchrun(tmp_path):
    """Start `torchrun script arguments`; at the end no process may be left."""
    runs = []

    def start(ranks, script, *arguments, restarts=0, env=None, launcher=None):
        mark = f"OPTC_TEST_RUN={uuid.uuid4().hex}"
        log = tmp_path / f"run{len(runs)}.log"
        command = launcher or [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}"),
        ]
        environment = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "OPTC_TEST_RUN": mark.split("=")[1]}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *([str(HERE / script)] if script else []), *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        runs.append(Run(process, mark, log))
        return runs[-1]

    yield start
    left = []
    for run in runs:
        run.process.poll()
        if run.process.returncode is not None:
            deadline = time.monotonic() + 20
            while run.alive() and time.monotonic() < deadline:
                time.sleep(0.2)
        left += run.alive()
        for pid in run.alive():
            os.kill(pid, signal.SIGKILL)
        run.process.wait(timeout=60)
    assert not left, "processes outlived their run"
