"""Run by torchrun: `python -m optc.training` with a rank that fails on purpose.

FAIL is a list of `attempt:rank:step:how`; how is kill (SIGKILL before the step), save (SIGKILL while the checkpoint of
that step is written), hang (the step never ends) or stop (SIGSTOP).
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch.distributed.checkpoint as dcp

from optc.training.trainer import Trainer

ATTEMPT, RANK = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("RANK", "0")
FAILURES = [failure.split(":") for failure in os.environ.get("FAIL", "").split(",") if failure]


def due(step, *kinds):
    return any((a, r, int(s)) == (ATTEMPT, RANK, step) and how in kinds for a, r, s, how in FAILURES)


def how(step):
    return next(h for a, r, s, h in FAILURES if (a, r, int(s)) == (ATTEMPT, RANK, step))


original_split, original_save = Trainer._split, dcp.save


def failing_split(self, inputs, targets):
    if due(self.step_number, "kill", "hang", "stop"):
        kind = how(self.step_number)
        if kind == "hang":
            time.sleep(10_000)
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    return original_split(self, inputs, targets)


def failing_save(state, checkpoint_id, **options):
    if due(int(checkpoint_id.name.split("-")[1].split(".")[0]), "save"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original_save(state, checkpoint_id=checkpoint_id, **options)


if __name__ == "__main__":
    Trainer._split, dcp.save = failing_split, failing_save
    runpy.run_module("optc.training", run_name="__main__")
