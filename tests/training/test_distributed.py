"""What ranks do when nobody is left to look after them."""

import subprocess
import sys
import uuid

from processes import environment, leave_nothing

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
