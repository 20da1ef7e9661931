"""How accuracy is measured, and what is no measure of it."""

import numpy as np
import pytest

from optc.compression.budget import Goal
from optc.compression.data import Samples
from optc.compression.evaluate import METRICS, Budget, Judge, labelled_score, max_drop, max_error, user_score
from optc.errors import AccuracyError, UsageError

SAMPLES = Samples("data", ({"x": np.eye(3, dtype=np.float32)}, {"x": -np.eye(3, dtype=np.float32)[:2]}))


def run(inputs):
    return {"y": inputs["x"]}


def test_budgets_are_read():
    assert max_drop("0.5%") == Budget("accuracy", 0.005)
    assert max_drop("0.01") == Budget("accuracy", 0.01)
    assert max_error("kl:0.1") == Budget("kl", 0.1)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (max_drop, "much"),
        (max_drop, "-1%"),
        (max_error, "kl"),
        (max_error, "loss:1"),
        (max_error, "kl:nan"),
        (max_drop, "inf"),
    ],
)
def test_what_is_no_budget(function, text):
    with pytest.raises(UsageError):
        function(text)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_zero_for_the_same_and_grow(metric):
    judge = Judge(None, metric, SAMPLES, run)
    assert judge.loss(run) == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (3, 3))
    near, far = (judge.loss(lambda i, s=s: {"y": i["x"] + s * noise[: len(i["x"])]}) for s in (0.3, 3.0))
    assert near <= far
    assert far > 0
    assert judge.loss(lambda i: {"y": i["x"] * np.nan}) == (
        float("inf") if metric != "top1" else pytest.approx(0.4, abs=0.4)
    )


def test_divergence_is_that_of_distributions():
    expected, found = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.5, 0.25]]))
    judge = Judge(None, "kl", Samples("d", ({"x": expected},)), run)
    assert judge.loss(lambda _: {"y": found}) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))


def test_labels():
    score = labelled_score(np.array([0, 1, 1, 1, 0]), SAMPLES, ["y"])
    assert score(run) == pytest.approx(0.8)
    judge = Judge(score, "accuracy", SAMPLES, run)
    assert judge.baseline == pytest.approx(0.8)
    assert judge.loss(lambda i: {"y": -i["x"]}) == pytest.approx(0.8 - score(lambda i: {"y": -i["x"]}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), "2 labels for 5 samples"),
        (np.zeros((5, 1), int), "one integer for each sample"),
        (np.zeros(5), "one integer for each sample"),
        (np.array([0, 1, 2, 1, -1]), "label -1 is no class"),
        ("nowhere.npy", "no such file"),
    ],
)
def test_labels_that_do_not_match_are_told_early(labels, message):
    with pytest.raises(UsageError, match=message):
        labelled_score(labels, SAMPLES, ["y"])


def test_labels_and_outputs_that_do_not_match():
    with pytest.raises(UsageError, match="label 3 is no class: 'y' has 3"):
        labelled_score(np.array([0, 1, 2, 3, 0]), SAMPLES, ["y"], 3)
    with pytest.raises(UsageError, match="label 3 is no class: 'y' has 3"):
        labelled_score(np.array([0, 1, 2, 3, 0]), SAMPLES, ["y"])(run)
    with pytest.raises(UsageError, match="not a row for each of 3 samples"):
        labelled_score(np.array([0, 1, 2, 1, 0]), SAMPLES, ["y"])(lambda _: {"y": np.zeros((1, 3))})


def test_labels_from_files(tmp_path):
    labels = np.array([0, 1, 1, 1, 0])
    np.save(tmp_path / "y.npy", labels)
    np.savez(tmp_path / "y.npz", y=labels)
    np.savez(tmp_path / "two.npz", y=labels, z=labels)
    (tmp_path / "broken.npy").write_bytes(b"no")
    for name in ("y.npy", "y.npz"):
        assert labelled_score(str(tmp_path / name), SAMPLES, ["y"])(run) == pytest.approx(0.8)
    for name in ("two.npz", "broken.npy"):
        with pytest.raises(UsageError):
            labelled_score(str(tmp_path / name), SAMPLES, ["y"])


def test_a_function_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def good(run):\n    return 0.5\ndef bad(run):\n    return None\nnumber = 3\n"
    (tmp_path / "scores_of_a_test.py").write_text(text)
    assert user_score("scores_of_a_test:good")(run) == 0.5
    with pytest.raises(AccuracyError, match="returned None, not a number"):
        user_score("scores_of_a_test:bad")(run)
    with pytest.raises(UsageError, match="not a function"):
        user_score("scores_of_a_test:number")


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": Budget("accuracy", 0.1)},
        {"budget": Budget("kl", 0.1), "labels": [1]},
        {"budget": Budget("accuracy", 0.1), "labels": [1], "evaluate": "a:b"},
        {"budget": Budget("kl", 0.1), "objective": "beauty"},
    ],
)
def test_goals_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        Goal(**wrong)
