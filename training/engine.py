"""Runs one step of a pipeline rank: its stages, in the order of the schedule, with torch's own runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from optc.errors import TrainingError
from optc.training.backward import Paths, input_gradients, weight_gradients
from optc.training.distributed import World
from optc.training.randomness import Clock
from optc.training.schedules import Schedule
from optc.training.stages import Stage
from optc.training.watch import WAITING, Watch

# It writes the whole schedule when a rank fails; the error says what matters.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

# Loss of one microbatch: the last stage's tensors and the number of the microbatch.
MicrobatchLoss = Callable[[Any, int], torch.Tensor]


class _RelayStage(PipelineStage):
    """Tells the clock and the watch what runs. Shapes are known, so torch need not find them by running the stage."""

    def __init__(self, module: torch.nn.Module, stage: Stage, number: int, count: int, world: World) -> None:
        super().__init__(
            module,
            number,
            count,
            world.device,
            input_args=stage.inputs,
            output_args=stage.outputs,
            group=world.pp_group,
        )
        self._planned = stage.outputs
        self._paths = Paths()

    def attach(self, clock: Clock, first_microbatch: int, watch: Watch) -> None:
        self._clock, self._first, self._watch = clock, first_microbatch, watch

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._clock.microbatch = self._first + fwd_chunk_id
        with self._watch.doing(f"forward of stage {self.stage_index}, microbatch {fwd_chunk_id}"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            self._refuse_lost_gradients(output)
        else:
            # torch would detach the outputs in place, which gradients of weights may still need; the loss holds them.
            self.fwd_cache[fwd_chunk_id] = ((), self.fwd_cache[fwd_chunk_id][1])
        return output

    def _refuse_lost_gradients(self, output: Any) -> None:
        """A tensor that was taken for one without a gradient would train what comes before it wrongly."""
        found = output if isinstance(output, tuple) else (output,)
        for number, (tensor, planned) in enumerate(zip(found, self._planned, strict=True)):
            if tensor.requires_grad and not planned.requires_grad:
                raise TrainingError(f"stage {self.stage_index} hands on tensor {number} without its gradient")

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._watch.doing(f"backward of stage {self.stage_index}, microbatch {bwd_chunk_id}"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._watch.doing(f"weight gradients of stage {self.stage_index}, microbatch {bwd_chunk_id}"):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], **options: Any) -> Any:
        """Split the backward pass in our own way; whole ones stay torch's."""
        if backward_type == "full":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, **options)
        if isinstance(self.submod, FSDPModule):
            # As torch does: the schedule reduces when all microbatches are done.
            self.submod.set_is_last_backward(False)
            self.submod.set_reshard_after_backward(False)
            self.submod.set_requires_gradient_sync(False)
        if backward_type == "weight":
            weight_gradients(bwd_kwargs["param_groups"])
            return (), None
        outputs, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        # The last stage's only output is its loss.
        gradients = [torch.ones_like(outputs[0])] if gradients is None else gradients
        inputs, weights = bwd_kwargs["input_values"], self.submod.parameters()
        found = input_gradients(outputs, gradients, inputs, weights, self._paths)
        for output in outputs:
            if not output._is_view():
                output.detach_()  # what only the way to the inputs needed can go
        return found


class Engine:
    """Forward and backward of all microbatches of one step; gradients end as the mean over this rank's microbatches."""

    def __init__(
        self,
        schedule: Schedule,
        microbatches: int,
        world: World,
        stages: dict[int, Stage],
        wrapped: dict[int, torch.nn.Module],
        clock: Clock,
        watch: Watch,
    ) -> None:
        self._microbatches, self._world, self._clock, self._watch = microbatches, world, clock, watch
        self._wrapped = wrapped
        self._loss: MicrobatchLoss | None = None
        count = schedule.stages(world.pp)
        self.first, self.last = 0 in stages, count - 1 in stages
        self._schedule: Any = None
        if world.pp == 1:
            return
        relays = []
        for number, stage in stages.items():
            relay = _RelayStage(wrapped[number], stage, number, count, world)
            relay.attach(clock, world.dp_rank * microbatches, watch)
            relays.append(relay)
        kind = get_schedule_class(schedule.name)
        several = issubclass(kind, PipelineScheduleMulti)
        self._schedule = kind(relays if several else relays[0], microbatches, loss_fn=self._microbatch_loss)

    def run(self, inputs: Sequence[torch.Tensor], loss: MicrobatchLoss) -> None:
        """Run one step; ``inputs`` are used by the rank with the first stage, ``loss`` by the one with the last."""
        self._loss = loss
        if self._schedule is None:
            self._accumulate(inputs)
            return
        arguments = inputs if self.first else ()
        # The numbers of the microbatches travel as targets; the targets themselves can then be anything.
        target = torch.arange(self._microbatches) if self.last else None
        self._watch.note(WAITING)
        self._schedule.step(*arguments, target=target, return_outputs=False)

    def _microbatch_loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        assert self._loss is not None
        return self._loss(output, int(number))

    def _accumulate(self, inputs: Sequence[torch.Tensor]) -> None:
        """A pipeline of one stage: gradients are accumulated over microbatches."""
        assert self._loss is not None
        (module,) = self._wrapped.values()
        sharded = hasattr(module, "set_requires_gradient_sync")
        parts = [torch.tensor_split(tensor, self._microbatches) for tensor in inputs]
        for index in range(self._microbatches):
            self._clock.microbatch = self._world.dp_rank * self._microbatches + index
            if sharded:
                module.set_requires_gradient_sync(index == self._microbatches - 1)
            # Sharded weights are gathered on the way.
            with self._watch.doing(f"forward and backward of microbatch {index}", talks=sharded):
                output = module(*(part[index] for part in parts))
                (self._loss(output, index) / self._microbatches).backward()
