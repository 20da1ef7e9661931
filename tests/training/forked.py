"""Starts ranks by fork, so that they import torch and transformers once for all of them.

A job is a line of JSON on standard input: `ranks`, `script`, `arguments`, `env`, `log`, `timeout`. As torchrun does,
all ranks are killed when one fails. The answer is a line with the exit status: 0 if every rank's was.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def import_what_takes_long():
    import recipes  # noqa: F401
    import torch
    import training_models as models
    import transformers  # noqa: F401

    import optc.training.loop  # noqa: F401
    from optc.training.analysis import analyse
    from optc.training.capture import capture

    torch.set_num_threads(1)
    analyse(capture(models.MLP(depth=1), torch.zeros(2, 16)))  # export imports more when it is first used


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait(pids, timeout):
    """The largest status of the processes; those that are left when one has failed, or after timeout, are killed."""
    status, deadline, left = 0, time.monotonic() + timeout, set(pids)
    while left:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            status = max(status, abs(os.waitstatus_to_exitcode(ended)))
        if (status and pid) or time.monotonic() > deadline:
            status = status or 1
            for other in left:
                os.kill(other, signal.SIGKILL)
        if not pid:
            time.sleep(0.05)
    return status


def become(rank, job, port):
    """Let this process be a rank: its output, its environment."""
    os.dup2(os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    number, count = str(rank), str(job["ranks"])
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **job["env"]}
    sys.argv = [job["script"], *job["arguments"]]


def serve():
    """Do jobs until there are no more; returns in every rank that was started."""
    for line in sys.stdin:
        job, port, pids = json.loads(line), free_port(), []
        for rank in range(job["ranks"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                become(rank, job, port)
                return job
        print(wait(pids, job["timeout"]), flush=True)
    return None


if __name__ == "__main__":
    import_what_takes_long()
    mine = serve()
    if mine is not None:
        runpy.run_path(str(HERE / mine["script"]), run_name="__main__")
