"""Killed, hanging and stopped ranks; checkpoints read by other numbers of ranks."""

import json
import os
import shutil
import subprocess
import sys
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
def arguments(plans, tmp_path):
    """Arguments of a run over a mesh; results go to the folder ``name``, checkpoints to ``name-checkpoints``."""

    def build(mesh, name, timeout=300):
        options = {"steps": STEPS, "every": 4, "metrics": tmp_path / name, "timeout": timeout, "plan": plans[mesh]}
        options["checkpoints"] = tmp_path / f"{name}-checkpoints"
        return [part for key, value in options.items() for part in (f"--{key}", value)]

    return build


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], STEPS + 1))
    return {line["step"]: line["loss"] for line in lines}


def test_killed_ranks_and_other_meshes_give_the_losses_of_an_undisturbed_run(torchrun, ranks, arguments, tmp_path):
    status, output = ranks(4, "train_and_fail.py", *arguments("4x1", "whole"))
    assert status == 0, output[-3000:]
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS

    # Rank 1 dies while the last checkpoint is written; a dead rank in a step is like one that hangs, see below.
    environment = {"FAIL": "0:1:8:save", "PYTHONPATH": str(Path(__file__).parent)}
    status, output = torchrun(4, "train_and_fail.py", *arguments("4x1", "killed"), restarts=1, env=environment)
    assert status == 0, output[-3000:]
    assert losses(tmp_path / "killed") == expected
    assert "exitcode: -9" in output

    for mesh, (pp, dp, _) in MESHES.items():
        copied = shutil.copytree(tmp_path / "whole-checkpoints", tmp_path / f"{mesh}-checkpoints")
        shutil.rmtree(copied / "step-00000008")
        (copied / "latest").write_text("step-00000004")
        status, output = ranks(pp * dp, "train_and_fail.py", *arguments(mesh, mesh))
        assert status == 0, output[-3000:]
        found = losses(tmp_path / mesh)
        assert sorted(found) == [5, 6, 7, 8]
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-6), mesh


@pytest.mark.parametrize(
    ("kind", "words"),
    [("hang", "rank 1 hangs"), ("stop", "rank 1 is dead or stopped")],
)
def test_a_rank_that_holds_up_the_others_is_named(ranks, arguments, kind, words):
    status, output = ranks(2, "train_and_fail.py", *arguments("2x1", kind, timeout=6), env={"FAIL": f"0:1:2:{kind}"})
    assert words in output, output[-3000:]
    assert "waited in vain at step 2" in output
    assert status != 0


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
