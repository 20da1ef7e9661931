import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from optc.cli.plan import command as plan_command
from optc.cli.split import command as split_command
from optc.cli.train import command as train_command
from optc.errors import MissingDependencyError, UsageError
from optc.training import Batches, Plan, Recipe
from optc.training.metrics import Log
from optc.training.recipe import load
from optc.training.schedules import find
from optc.training.simulate import StageTimes, simulate
from optc.training.timeline import page, svg


class Numbers:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index)]), torch.tensor(index)


def samples(batches, step, pieces, size=4):
    """The targets of one batch, read in ``pieces`` equal shares."""
    share = size // pieces
    parts = [batches.batch(step, share * i, share * (i + 1), size)[1] for i in range(pieces)]
    return torch.cat(parts).tolist()


def test_batches_are_the_same_in_any_number_of_shares():
    batches = Batches(Numbers(), seed=3)
    for step in range(4):
        assert samples(batches, step, 1) == samples(batches, step, 2) == samples(batches, step, 4)


def test_an_epoch_sees_every_sample_at_most_once_and_epochs_differ():
    batches = Batches(Numbers(), seed=3)
    first, second = ([*samples(batches, 2 * e, 1), *samples(batches, 2 * e + 1, 1)] for e in (0, 1))
    assert len(set(first)) == len(first) == 8
    assert first != second
    assert Batches(Numbers(), shuffle=False).batch(0, 0, 4, 4)[1].tolist() == [0, 1, 2, 3]


def test_a_batch_larger_than_the_dataset_is_an_error():
    with pytest.raises(UsageError, match="a batch has 11 samples, the dataset 10"):
        Batches(Numbers()).batch(0, 0, 11, 11)


FACTORIES = """
import torch
from optc.training import Recipe
def recipe():
    return Recipe(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)]), torch.zeros(2, 8))
def pair():
    return torch.nn.Linear(8, 8), torch.zeros(2, 8)
def number():
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("factories_of_test", None)
    return "factories_of_test"


def test_recipes_are_found_in_the_current_folder(factories):
    assert isinstance(load(f"{factories}:recipe"), Recipe)
    assert isinstance(load(f"{factories}:pair").module, torch.nn.Linear)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}:number", "returned a int"),
        ("{}:missing", "has no 'missing'"),
        ("{}", "is not package.module:factory"),
        ("no_such_module:f", "cannot import no_such_module"),
    ],
)
def test_bad_recipes_are_errors(factories, text, message):
    with pytest.raises(UsageError, match=message):
        load(text.format(factories))


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_split_writes_a_plan_and_draws_it(factories):
    result = invoke(
        split_command, f"{factories}:recipe", "--stages", 3, "--timeline", "a.svg", "--save-costs", "c.json"
    )
    assert "slowest stage" in result.output
    plan = Plan.load("plan.json")
    assert (plan.pp, plan.dp, plan.microbatches, len(plan.cuts)) == (3, 1, 12, 2)
    assert plan.model == f"{factories}:recipe"
    assert ElementTree.fromstring(Path("a.svg").read_text()).tag.endswith("svg")
    again = invoke(split_command, f"{factories}:recipe", "--stages", 3, "--costs", "c.json", "--json")
    assert json.loads(again.output)["cuts"] == list(plan.cuts)


def test_plan_reads_a_cluster(factories):
    Path("cluster.toml").write_text("devices = 2\npp = 2\nschedule = 'zbv'\n")
    result = invoke(plan_command, f"{factories}:recipe", "-c", "cluster.toml", "--timeline", "a.html", "-o", "p.json")
    assert "ZBV" in result.output
    assert Plan.load("p.json").schedule == "ZBVZeroBubble"
    assert "<svg" in Path("a.html").read_text()


def test_mistakes_of_the_command_line_are_told_before_work_starts(factories):
    with pytest.raises(UsageError, match=r"drawn as \.svg or \.html"):
        invoke(split_command, f"{factories}:recipe", "--stages", 2, "--timeline", "a.png")
    with pytest.raises(UsageError, match="the folder of"):
        invoke(split_command, f"{factories}:recipe", "--stages", 2, "-o", "missing/plan.json")
    with pytest.raises(UsageError, match="either --plan or --cluster"):
        invoke(train_command, f"{factories}:recipe")
    Path("cluster.toml").write_text("devices = 1\n")
    with pytest.raises(UsageError, match="no loss_fn or no data"):
        invoke(train_command, f"{factories}:recipe", "-c", "cluster.toml", "--steps", 1)
    assert "Missing option '--steps'" in invoke(train_command, f"{factories}:recipe", "-c", "cluster.toml").output
    assert not Path("plan.json").exists()


def test_the_picture_has_a_box_for_every_action():
    timeline = simulate(find("ZBV"), 2, 4, [StageTimes(0.001, 0.001, 0.001)] * 4)
    root = ElementTree.fromstring(svg(timeline))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert len(titles) == len(timeline.events)
    assert "forward, stage 0, microbatch 0: 0.000 to 1.000 ms" in titles
    assert "&lt;script&gt;" in page(timeline, "<script>", "report")


def test_a_resumed_log_drops_the_steps_that_are_repeated(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, loss=float(step), lr=None)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log = Log(tmp_path, 2)
    log.add(3, loss=9.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="TensorBoard is not installed"):
        Log(tmp_path, 0, tensorboard=True)
