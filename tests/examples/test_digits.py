"""The examples that train on digits run to their end; how well they do is for who runs them in full."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: str, **constants: int) -> None:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    return run


def test_pruning(example, capsys):
    example("prune_digits", "--fine-tune", "1", CNN_STEPS=1, VIT_STEPS=1)
    printed = capsys.readouterr().out
    assert printed.count("fine-tuned") == 2 and printed.count("64 images") == 2


def test_training(example, capsys):
    example("train_digits", "--seeds", "1", "--steps", "2")
    assert "teacher, 300 labels" in capsys.readouterr().out
