"""Losses that let a small model learn from a large one.

G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from optc.errors import UsageError


def _tensor(output: Any) -> torch.Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, torch.Tensor):
        raise UsageError(f"a {type(found).__name__} has no logits", hint="Distillation(…, logits=lambda output: …)")
    return found


class Distillation:
    """``alpha`` of the divergence from the teacher's softened distribution, the rest of ``loss_fn``.

    Args:
        teacher: any module; it is run in evaluation mode, without gradients, where the last stage is, on the inputs of
            the microbatch.
        loss_fn: of the student's output and the target.
        temperature: divides both logits; the divergence is multiplied by its square, so that gradients keep their size.
        alpha: between 0 (the teacher is not asked) and 1 (targets are not looked at, so that data needs no labels).
        logits: finds the logits, classes last, in the output of teacher and student.
    """

    needs_inputs = True

    def __init__(
        self,
        teacher: torch.nn.Module,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        *,
        temperature: float = 4.0,
        alpha: float = 0.5,
        logits: Callable[[Any], torch.Tensor] = _tensor,
    ) -> None:
        if not 0 <= alpha <= 1 or temperature <= 0:
            raise UsageError(f"alpha {alpha} must lie between 0 and 1, temperature {temperature} above 0")
        self._teacher = teacher.eval().requires_grad_(False)
        self._loss_fn, self._temperature, self._alpha, self._logits = loss_fn, temperature, alpha, logits

    def __call__(self, output: Any, target: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """The loss of one microbatch, a scalar."""
        if self._alpha == 0:
            return self._loss_fn(output, target)
        with torch.no_grad():
            taught = self._logits(self._teacher.to(inputs[0].device)(*inputs))
        student = self._logits(output)
        if taught.shape != student.shape:
            raise UsageError(f"the teacher's logits are {tuple(taught.shape)}, the student's {tuple(student.shape)}")
        soft = F.kl_div(
            F.log_softmax(student.float() / self._temperature, -1).flatten(0, -2),
            F.log_softmax(taught.float() / self._temperature, -1).flatten(0, -2),
            log_target=True,
            reduction="batchmean",
        )
        soft = self._temperature**2 * soft
        if self._alpha == 1:
            return soft  # targets may be anything
        return self._alpha * soft + (1 - self._alpha) * self._loss_fn(output, target)
