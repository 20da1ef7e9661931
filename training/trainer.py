"""Trains a module by a plan: one object per rank, the same calls on every rank."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree

from optc.errors import CheckpointError, InputError, TrainingError, UsageError
from optc.training import checkpoint, distributed, gradients
from optc.training.analysis import analyse, autocast
from optc.training.capture import as_tuple
from optc.training.engine import Engine
from optc.training.planning import Plan
from optc.training.randomness import Clock
from optc.training.stages import Stage, build, restore_outputs
from optc.training.watch import WAITING, Watch
from optc.training.weights import (
    Weights,
    empty_optimizer_tensors,
    optimizer_tensors,
    restore_optimizer,
)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Training of one model over the ranks of a plan.

    Args:
        module: the model that was planned; its weights are copied, and it is not changed.
        loss_fn: ``loss_fn(output, target)`` of one microbatch, a scalar; ``output`` is what the module returns. One
            with a true attribute ``needs_inputs`` is called with the microbatch's inputs besides.
        plan: of ``optc.training.plan``.
        optimizer: makes a torch optimizer of a list of parameters; it is given those of this rank.
        lr_schedule: makes a torch learning rate scheduler of an optimizer; it steps once a step, one that looks at
            a plateau with the loss.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp16`` (autocast, scaled loss).
        clip: largest norm of all gradients together.
        seed: of dropout and other random operators.
        timeout: seconds after which waiting for other ranks is an error that names them.
        checkpoints: folder for ``save`` and ``resume``; ``keep`` newest stay.

    Raises:
        UsageError: the plan is for another model or number of ranks, the loss has weights that nobody would train, or
            the optimizer needs a closure.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        plan: Plan,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        *,
        lr_schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        precision: str = "fp32",
        clip: float | None = None,
        seed: int = 0,
        timeout: float = distributed.DEFAULT_TIMEOUT,
        checkpoints: str | os.PathLike[str] | None = None,
        keep: int = 3,
    ) -> None:
        if precision not in PRECISIONS:
            raise UsageError(f"there is no precision '{precision}'", hint=f"precisions: {', '.join(PRECISIONS)}")
        _refuse_weights_of(loss_fn)
        self.plan, self.step_number, self.norm = plan, 0, math.nan
        self._module, self._loss_fn, self._clip, self._keep = module, loss_fn, clip, keep
        self._folder = None if checkpoints is None else Path(checkpoints)
        self._dtype = PRECISIONS[precision]
        self._scaler = gradients.LossScaler() if precision == "fp16" else None
        self.world = distributed.join(plan.pp, plan.dp, timeout)
        self._watch = Watch(self.world)
        self._clock = Clock(seed=seed)
        self._layout = plan.bind(module)
        self._stages = self._build_stages()
        cuts = plan.positions(self._layout)
        self._weights = Weights(self._layout, cuts, plan.kind, self._stages, self.world, timeout)
        self._weights.synchronize(module)
        self._sharded = self._shard()
        self._engine = Engine(
            plan.kind, plan.microbatches, self.world, self._stages, dict(self._stages), self._clock, self._watch
        )
        parameters = self._weights.parameters()
        # A stage without weights has nothing to optimize.
        self._optimizer = _without_closure(optimizer(parameters)) if parameters else None
        self._scheduler = lr_schedule(self._optimizer) if lr_schedule and self._optimizer else None
        self._masks: dict[str, torch.Tensor] = {}
        self._asked_to_stop = self.stopping = False

    def ask_to_stop(self) -> None:
        """Let ``stopping`` become true on every rank with the end of the step that runs; any rank may ask."""
        self._asked_to_stop = True

    def _build_stages(self) -> dict[int, Stage]:
        plan, layout = self.plan, self._layout
        facts = layout.facts if self._dtype is None else analyse(layout.program, self._dtype, self.world.device)
        cuts = plan.positions(layout)
        return {
            number: build(
                layout,
                facts,
                cuts,
                number,
                self._clock,
                device=self.world.device,
                dtype=self._dtype,
                recompute=plan.recompute,
            )
            for number in plan.kind.stages_of(self.world.pp_rank, plan.pp)
        }

    def _shard(self) -> bool:
        """Shard the stages over dp with FSDP if the plan says so; says whether it did."""
        if self.plan.dp == 1 or self.plan.data_parallel != "fsdp":
            return False
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(self.world.dp_group, self.world.device.type, mesh_dim_names=("dp",))
        for stage in self._stages.values():
            for parameter in stage.parameters():
                parameter.data = parameter.data.contiguous()  # FSDP refuses others, such as channels last
            if any(True for _ in stage.parameters()):
                fully_shard(stage, mesh=mesh)
        self._weights.rebind()
        return True

    def step(self, inputs: Any, targets: Any) -> float:
        """Train on one batch: forward, backward, reductions, update.

        ``inputs`` (a tensor or a tuple of them) and ``targets`` (tensors in any nesting) are this replica's whole
        batch: microbatches times the planned microbatch along dimension 0, the same on all ranks of a pipeline.
        Returns the mean loss over all microbatches and replicas, the same on every rank.

        Raises:
            InputError: the batch has another size or type than was planned.
            TrainingError: the loss or, with ``clip``, the norm is not finite; weights are not updated. With ``fp16``
                such a step is skipped instead, and the loss scaled less.
            RankFailureError: another rank died or hangs; the message names it.
        """
        arguments, split_targets = self._split(inputs, targets)
        self._watch.at_step(self.step_number)
        self._clock.step = self.step_number
        with self._watch.guard("preparing a step", talks=False):
            for parameter in self._weights.parameters():
                parameter.grad = None
            losses = self._forward_backward(arguments, split_targets)
            loss = self._reduce(losses)
            self._refuse_not_finite("loss", loss)
            self._watch.note("updating weights")
            self._update(loss)
            if self.world.dp > 1:
                self._watch.note(WAITING)
                self._weights.share_buffers()
        self.step_number += 1
        return loss

    def _split(self, inputs: Any, targets: Any) -> tuple[tuple[torch.Tensor, ...], list[Any]]:
        plan, count = self.plan, self.plan.microbatches
        arguments = as_tuple(inputs)
        if len(arguments) != len(plan.inputs):
            raise InputError(f"{len(arguments)} inputs were given, the model has {len(plan.inputs)}")
        for position, (tensor, (shape, dtype)) in enumerate(zip(arguments, plan.inputs, strict=True)):
            wanted = (shape[0] * count, *shape[1:])
            if tuple(tensor.shape) != wanted or tensor.dtype != getattr(torch, dtype):
                raise InputError(
                    f"input {position} is {tensor.dtype} {tuple(tensor.shape)}, planned were torch.{dtype} {wanted}: "
                    f"{count} microbatches of {shape[0]}"
                )
        device = self.world.device
        leaves, spec = pytree.tree_flatten(targets)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] % count:
                raise InputError(f"targets must be tensors whose first dimension divides into {count} microbatches")
        parts = [torch.tensor_split(leaf.to(device), count) for leaf in leaves]
        split = [pytree.tree_unflatten([part[index] for part in parts], spec) for index in range(count)]
        return tuple(tensor.to(device) for tensor in arguments), split

    def _forward_backward(self, inputs: tuple[torch.Tensor, ...], targets: list[Any]) -> list[float]:
        losses: list[torch.Tensor] = []
        microbatches = [torch.tensor_split(tensor, self.plan.microbatches) for tensor in inputs]

        def loss(output: Any, number: int) -> torch.Tensor:
            extra = [part[number] for part in microbatches] if getattr(self._loss_fn, "needs_inputs", False) else []
            with autocast(self.world.device, self._dtype):
                value = self._loss_fn(restore_outputs(self._layout, output), targets[number], *extra)
            if value.dim():
                raise UsageError(f"loss_fn returned a tensor of shape {tuple(value.shape)}, not a scalar")
            losses.append(value.detach())
            return value if self._scaler is None else value * self._scaler.value

        self._engine.run(inputs, loss)
        return [float(value) for value in losses]

    def _reduce(self, losses: list[float]) -> float:
        """Finish the gradients; return the loss of the whole step."""
        world, weights = self.world, self._weights
        self._watch.note(WAITING)
        if world.dp > 1 and not self._sharded:
            gradients.average_over_replicas(weights.owned, world)
        gradients.sum_tied(weights.owned, weights.tied)
        totals = [math.fsum(losses), float(self._asked_to_stop)]
        if world.size > 1:
            summed = torch.tensor(totals, dtype=torch.float64, device=world.device)
            dist.all_reduce(summed)
            totals = summed.tolist()
        self.stopping = totals[1] > 0
        return totals[0] / (self.plan.microbatches * world.dp)

    def _refuse_not_finite(self, what: str, value: float) -> None:
        if self._scaler is None and not math.isfinite(value):
            raise TrainingError(
                f"the {what} of step {self.step_number} is {value}; weights were not updated",
                hint="resume from the last checkpoint with a smaller learning rate or with clip, and look at the batch",
            )

    def _update(self, loss: float) -> None:
        weights = self._weights
        finite = True
        if self._scaler is not None:
            gradients.scale(weights.owned, 1 / self._scaler.value)
        if self._clip is not None or self._scaler is not None:
            self._watch.note(WAITING)
            self.norm = gradients.global_norm(weights.owned, self.world, sharded=self._sharded)
            self._refuse_not_finite("norm of the gradients", self.norm)
            finite = math.isfinite(self.norm)
            self._watch.note("updating weights")
        if self._clip is not None and finite and self.norm > self._clip:
            gradients.scale(weights.owned, self._clip / (self.norm + 1e-6))
        if self._scaler is not None:
            self._scaler.update(finite)
        if self._optimizer is not None and finite:
            self._optimizer.step()
            self._apply_masks()
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()

    def set_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Keep weights at zero where their mask, by original name and of their shape, is zero; saved in checkpoints."""
        known = {item.name: item.parameter for item in self._weights.owned}
        everywhere = set(self._layout.program.canonical.values())
        for name, mask in masks.items():
            if name not in everywhere:
                raise UsageError(f"there is no weight '{name}' to mask")
            if name in known and tuple(mask.shape) != tuple(known[name].shape):
                raise UsageError(f"the mask of '{name}' is {tuple(mask.shape)}, the weight {tuple(known[name].shape)}")
        self._masks = {name: self._like(known[name], mask) for name, mask in masks.items() if name in known}
        self._apply_masks()

    def _like(self, parameter: torch.nn.Parameter, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.to(self.world.device, torch.bool)
        if not hasattr(parameter, "device_mesh"):
            return mask
        from torch.distributed.tensor import distribute_tensor

        sharded: torch.Tensor = distribute_tensor(mask, parameter.device_mesh, parameter.placements)
        return sharded

    def _apply_masks(self) -> None:
        with torch.no_grad():
            for item in self._weights.owned:
                if item.name in self._masks:
                    gradients.local(item.parameter).mul_(gradients.local(self._masks[item.name]))

    def learning_rate(self) -> float | None:
        """Of this rank's first parameter group; None without parameters."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer else None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last step, as the optimizer saw them, by original name; on rank 0, empty elsewhere.

        Collective. Tied weights appear under their first name, weights without a gradient not at all.
        """
        with self._watch.guard("gathering gradients"):
            return distributed.gather_tensors(self._weights.whole_gradients(), self.world)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights as ``module.state_dict()`` names them, on the CPU; on rank 0, empty elsewhere. Collective."""
        with self._watch.guard("gathering weights"):
            found = distributed.gather_tensors(self._weights.whole(), self.world)
        if self.world.rank != 0:
            return {}
        canonical = self._layout.program.canonical
        state = self._module.state_dict()
        return {name: found.get(canonical.get(name, name), tensor.detach().cpu()) for name, tensor in state.items()}

    def save(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint of this step; ``extra`` (JSON) comes back from ``resume``. Collective.

        Raises:
            UsageError: there is no folder for checkpoints.
            TrainingError: weights are not finite; older checkpoints stay as they are.
            CheckpointError: a rank cannot write.
        """
        if self._folder is None:
            raise UsageError("there is no folder for checkpoints", hint="Trainer(…, checkpoints='folder')")
        with self._watch.guard("looking at weights"):
            broken = self._weights.not_finite()
        if broken:
            raise TrainingError(
                f"after step {self.step_number} {len(broken)} weights are not finite: {', '.join(broken[:5])}",
                hint="no checkpoint was written; resume from the last one with a smaller learning rate or with clip",
            )
        tensors = {f"model/{name}": tensor for name, tensor in self._weights.tensors().items()}
        if self._optimizer is not None:
            state = optimizer_tensors(self._optimizer, self._weights.owned)
            tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
        tensors |= {f"mask/{name}": mask for name, mask in self._masks.items()}
        tensors |= self._unused()
        with self._watch.guard("writing a checkpoint"):
            info = self._info() | {"extra": dict(extra or {})}
            return checkpoint.save(self._folder, self.step_number, tensors, info, rank=self.world.rank, keep=self._keep)

    def _unused(self) -> dict[str, torch.Tensor]:
        """Weights that no stage reads: rank 0 keeps them, so that a checkpoint holds the whole module."""
        if self.world.rank != 0:
            return {}
        canonical = self._layout.program.canonical
        read = {weight.name for weight in self._layout.weights()}
        state = {canonical.get(name, name): tensor for name, tensor in self._module.state_dict().items()}
        return {f"model/{name}": tensor for name, tensor in state.items() if name not in read}

    def _info(self) -> dict[str, Any]:
        """What a checkpoint says besides tensors; gathered, because not every rank has an optimizer."""
        mine = None
        if self._optimizer is not None:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
            mine = {"groups": groups, "scheduler": self._scheduler.state_dict() if self._scheduler else None}
        everyone: list[Any] = [mine]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, mine)
        optimizer = next((found for found in everyone if found is not None), None)
        scaler = self._scaler.state() if self._scaler else None
        weights = checkpoint.weight_names(self._module)
        return {"optimizer": optimizer, "scaler": scaler, "seed": self._clock.seed, "weights": weights}

    def resume(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any] | None:
        """Continue from a checkpoint, by default the latest in the folder; None if there is none yet.

        It may have been written by any number of ranks. Returns what ``save`` was given as ``extra``. Collective.
        """
        if path is None and self._folder is None:
            raise UsageError("there is no folder for checkpoints", hint="Trainer(…, checkpoints='folder')")
        with self._watch.guard("reading a checkpoint"):
            # One rank looks, so that all see the same one.
            found = distributed.agree(self._find(path))
            if isinstance(found, CheckpointError):
                raise found
            if found is None:
                return None
            return self._load(Path(found))

    def _find(self, path: str | os.PathLike[str] | None) -> str | CheckpointError | None:
        if self.world.rank != 0:
            return None
        try:
            assert self._folder is not None or path is not None
            found = checkpoint.latest(self._folder) if path is None else checkpoint.find(Path(path))  # type: ignore[arg-type]
            return None if found is None else str(found)
        except CheckpointError as error:
            return error

    def _load(self, path: Path) -> dict[str, Any]:
        info, known = checkpoint.verify(path), checkpoint.shapes(path)
        checkpoint.require_same_weights(path, info, self._module)
        weights = {f"model/{name}": tensor for name, tensor in self._weights.tensors().items()}
        kept = {name.removeprefix("optimizer/"): v for name, v in known.items() if name.startswith("optimizer/")}
        state = empty_optimizer_tensors(kept, self._weights.owned) if self._optimizer is not None else {}
        masks = {
            name: torch.zeros_like(item.parameter.detach(), dtype=torch.bool)
            for item in self._weights.owned
            if (name := f"mask/{item.name}") in known
        }
        checkpoint.load(path, weights | {f"optimizer/{name}": tensor for name, tensor in state.items()} | masks)
        self._weights.spread({name.removeprefix("model/"): tensor for name, tensor in weights.items()})
        self._masks = {name.removeprefix("mask/"): mask for name, mask in masks.items()}
        if self._optimizer is not None:
            restore_optimizer(self._optimizer, self._weights.owned, state)
            self._restore_groups(path, info["optimizer"])
        if self._scaler is not None and info["scaler"] is not None:
            self._scaler.restore(info["scaler"])
        self._clock.seed = info["seed"]
        self.step_number = int(info["step"])
        return dict(info["extra"])

    def _restore_groups(self, path: Path, saved: Mapping[str, Any] | None) -> None:
        assert self._optimizer is not None
        if saved is None or len(saved["groups"]) != len(self._optimizer.param_groups):
            raise CheckpointError(f"{path} was written with another optimizer: its parameter groups differ")
        for group, values in zip(self._optimizer.param_groups, saved["groups"], strict=True):
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        if self._scheduler is not None and saved["scheduler"] is not None:
            self._scheduler.load_state_dict(saved["scheduler"])

    def close(self) -> None:
        """Stop telling other ranks what this one does; the process group stays."""
        self._watch.close()


def _refuse_weights_of(loss_fn: Callable[..., torch.Tensor]) -> None:
    if isinstance(loss_fn, torch.nn.Module):
        names = [name for name, weight in loss_fn.named_parameters() if weight.requires_grad]
        if names:
            raise UsageError(
                f"loss_fn has {len(names)} weights that would not be trained: {', '.join(names[:5])}",
                hint="make them part of the module, or freeze them",
            )


def _without_closure(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"{type(optimizer).__name__} runs the model several times a step, which a pipeline does not",
            hint="take an optimizer whose step needs no closure",
        )
    return optimizer
