"""Killed, hanging and stopped ranks; checkpoints read by other numbers of ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipes

from optc.training import plan
from optc.training.roofline import Rates

STEPS = 8
MESHES = {"4x1": (4, 1, 4), "2x1": (2, 1, 4), "1x1": (1, 1, 4), "2x2": (2, 2, 2)}
RATES = Rates(products=5e10, convolutions=3e10, memory=1e10, overhead=2e-6)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A plan file for each mesh; all process the same batch."""
    from optc.training.analysis import analyse
    from optc.training.capture import capture
    from optc.training.roofline import estimate

    recipe = recipes.gpt()
    program = capture(recipe.module, recipe.example_inputs)
    costs = estimate(program, analyse(program), RATES)
    folder, paths = tmp_path_factory.mktemp("plans"), {}
    for name, (pp, dp, microbatches) in MESHES.items():
        cluster = {"pp": pp, "dp": dp, "schedule": "1F1B", "microbatches": microbatches, "data_parallel": "fsdp"}
        made = plan(recipe.module, recipe.example_inputs, cluster, costs=costs, model="recipes:gpt")
        made.save(folder / f"{name}.json")
        paths[name] = folder / f"{name}.json"
    return paths


@pytest.fixture
def train(torchrun, plans, tmp_path):
    def start(mesh, name, *, fail="", restarts=0, timeout=60, steps=STEPS, checkpoints=None):
        pp, dp, _ = MESHES[mesh]
        options = {"steps": steps, "every": 4, "metrics": tmp_path / name, "timeout": timeout, "plan": plans[mesh]}
        options["checkpoints"] = checkpoints or tmp_path / f"{name}-checkpoints"
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        environment = {"FAIL": fail, "PYTHONPATH": str(Path(__file__).parent)}
        return torchrun(pp * dp, "train_and_fail.py", *arguments, restarts=restarts, env=environment)

    return start


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], STEPS + 1))
    return {line["step"]: line["loss"] for line in lines}


def test_killed_ranks_and_other_meshes_give_the_losses_of_an_undisturbed_run(train, tmp_path):
    run = train("4x1", "whole").wait()
    assert run.process.returncode == 0, run.output[-3000:]
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS

    # One rank dies in step 6, another one while the checkpoint of step 8 is written.
    run = train("4x1", "killed", fail="0:2:5:kill,1:1:8:save", restarts=2).wait()
    assert run.process.returncode == 0, run.output[-3000:]
    assert losses(tmp_path / "killed") == expected

    for mesh in ("2x1", "1x1", "2x2"):
        source = tmp_path / "whole-checkpoints"
        copied = shutil.copytree(source, tmp_path / f"{mesh}-checkpoints")
        shutil.rmtree(copied / "step-00000008")
        (copied / "latest").write_text("step-00000004")
        run = train(mesh, mesh).wait()
        assert run.process.returncode == 0, run.output[-3000:]
        found = losses(tmp_path / mesh)
        assert sorted(found) == [5, 6, 7, 8]
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-6), mesh


@pytest.mark.parametrize(("kind", "words"), [("hang", "rank 1 hangs"), ("stop", "rank 1 is dead or stopped")])
def test_a_rank_that_holds_up_the_others_is_named(train, kind, words):
    run = train("2x1", kind, fail=f"0:1:2:{kind}", timeout=6)
    deadline = time.monotonic() + 200
    while words not in run.output and time.monotonic() < deadline:
        time.sleep(0.5)
    text = run.output
    # torchrun asks a stopped process to end, and kills it 30 s later.
    if kind == "stop":
        for pid in run.alive():
            os.kill(pid, signal.SIGCONT)
    run.wait()
    assert words in text, text[-3000:]
    assert "waited in vain at step 2" in text
    assert run.process.returncode != 0


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from optc.training import checkpoint

folder = Path(sys.argv[1])

def save(step):
    checkpoint.save(folder, step, {"model/w": torch.full((1000,), float(step))}, {}, rank=0, keep=2)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(function):
    def run(*arguments, **options):
        function(*arguments, **options)
        die()
    return run

save(1)
points = [
    (dcp, "save", die), (dcp, "save", die_after(dcp.save)), (checkpoint, "_sync", die),
    (Path, "rename", die), (Path, "rename", die_after(Path.rename)),
    (Path, "replace", die), (Path, "replace", die_after(Path.replace)), (checkpoint, "_replace", die),
]
for number, (owner, name, replacement) in enumerate(points):
    child = os.fork()
    if child == 0:
        setattr(owner, name, replacement)
        save(2 + number)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    found = checkpoint.latest(folder)
    tensor = torch.empty(1000)
    checkpoint.load(found, {"model/w": tensor})
    step = int(found.name.split("-")[1])
    assert checkpoint.read_info(found)["step"] == step and bool((tensor == step).all()), number
    print(number, found.name)
save(100)
assert checkpoint.latest(folder).name == "step-00000100"
"""


def test_latest_is_complete_wherever_a_checkpoint_is_interrupted(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *[f"{number} step-00000001" for number in range(6)],
        "6 step-00000008",
        "7 step-00000008",
    ]
