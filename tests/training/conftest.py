import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

# Models are shared with the scripts that ranks run.
sys.path.insert(0, str(Path(__file__).parent))
from processes import environment, leave_nothing

HERE = Path(__file__).parent


@pytest.fixture
def torchrun(tmp_path):
    """Run `torchrun script arguments` to its end; no process may be left. Returns the exit status and the output."""

    def run(ranks, script, *arguments, restarts=0, env=None):
        mark, log = uuid.uuid4().hex, tmp_path / "torchrun.log"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}"),
            *(str(HERE / script), *map(str, arguments)),
        ]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(mark) | (env or {}))
        try:
            status = process.wait(timeout=500)
        finally:
            process.kill()
            leave_nothing(mark.encode())
        return status, log.read_text(encoding="utf-8", errors="replace")

    return run


@pytest.fixture(scope="session")
def server():
    """The process that ranks are forked from."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(HERE / "forked.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(mark),
        text=True,
    )
    yield process, mark.encode()
    process.stdin.close()
    process.wait(timeout=60)
    leave_nothing(mark.encode())


@pytest.fixture
def ranks(server, tmp_path):
    """Run a script as several ranks, without torchrun; no process may be left. Returns status and output."""
    process, mark = server

    def run(count, script, *arguments, env=None):
        log = tmp_path / "ranks.log"
        log.unlink(missing_ok=True)
        job = {"ranks": count, "script": script, "arguments": [*map(str, arguments)], "env": env or {}}
        process.stdin.write(json.dumps(job | {"log": str(log), "timeout": 500}) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        leave_nothing(mark, allowed=[process.pid])
        return status, log.read_text(encoding="utf-8", errors="replace")

    return run
