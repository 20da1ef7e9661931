"""Pipeline-parallel training: capture, split, plan, simulate, train.

    plan = optc.training.plan(module, example_inputs, {"devices": 4})
    trainer = optc.training.Trainer(module, loss_fn, plan, optimizer=lambda params: AdamW(params))
    loss = trainer.step(inputs, targets)

Needs PyTorch, which is imported with the first name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optc.errors import MissingDependencyError

_HOME = {
    "plan": ("optc.training.planning", "plan"),
    "Plan": ("optc.training.planning", "Plan"),
    "costs_of": ("optc.training.planning", "costs_of"),
    "Distillation": ("optc.training.distill", "Distillation"),
    "load_weights": ("optc.training.checkpoint", "load_weights"),
    "Recipe": ("optc.training.recipe", "Recipe"),
    "Batches": ("optc.training.recipe", "Batches"),
    "Trainer": ("optc.training.trainer", "Trainer"),
}

__all__ = ["Batches", "Distillation", "Plan", "Recipe", "Trainer", "costs_of", "load_weights", "plan"]

if TYPE_CHECKING:
    from optc.training.checkpoint import load_weights
    from optc.training.distill import Distillation
    from optc.training.planning import Plan, costs_of, plan
    from optc.training.recipe import Batches, Recipe
    from optc.training.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optc.training' has no attribute '{name}'")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("training needs PyTorch", hint="pip install 'optc[torch]'") from error
    home, attribute = _HOME[name]
    return getattr(import_module(home), attribute)
