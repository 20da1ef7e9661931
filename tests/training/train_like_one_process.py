"""Run by torchrun: trains models over all ranks and compares with the same training in one process.

Arguments are cases `model:pp:dp:schedule:data_parallel`; a line of JSON per case is printed by rank 0. The reference
sees the same microbatches, because batch normalization and the order of sums depend on them.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_models as models

from optc.training import Trainer, plan

MICROBATCHES, SIZE = 8, 2


def make_optimizer(parameters):
    # Not Adam: where a gradient is zero but for rounding (the bias of attention keys) it takes steps of random sign.
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def reference(module, inputs, targets, loss_fn, steps, parts):
    optimizer = make_optimizer(module.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for index in range(parts):
            part = [tensor.tensor_split(parts)[index] for tensor in inputs]
            loss = loss_fn(module(*part), targets.tensor_split(parts)[index]) / parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def relative(found, wanted):
    # A gradient that is zero but for rounding (a bias before a normalization) has no relative error of its own.
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-6))


def run(case, steps):
    name, pp, dp, schedule, kind = case.split(":")
    pp, dp = int(pp), int(dp)
    microbatches = MICROBATCHES // dp
    module, inputs, targets, loss_fn = models.build(name, MICROBATCHES * SIZE)
    cluster = {"pp": pp, "dp": dp, "schedule": schedule, "microbatches": microbatches, "data_parallel": kind}
    # Two stages on one device would not be split by speed alone: any costs do, as long as all ranks agree.
    made = plan(module, tuple(tensor[:SIZE] for tensor in inputs), cluster, costs="roofline")
    trainer = Trainer(module, loss_fn, made, make_optimizer, timeout=120)
    share = slice(trainer.world.dp_rank * microbatches * SIZE, (trainer.world.dp_rank + 1) * microbatches * SIZE)
    mine, wanted = tuple(tensor[share] for tensor in inputs), targets[share]
    losses = [trainer.step(mine, wanted)]
    gradients = trainer.gradients()
    losses += [trainer.step(mine, wanted) for _ in range(steps - 1)]
    state = trainer.state_dict()
    trainer.close()
    if trainer.world.rank != 0:
        return None
    single = copy.deepcopy(module)
    expected = reference(single, inputs, targets, loss_fn, 1, MICROBATCHES)
    named = {key: parameter.grad.clone() for key, parameter in single.named_parameters() if parameter.grad is not None}
    single = copy.deepcopy(module)
    expected = reference(single, inputs, targets, loss_fn, steps, MICROBATCHES)
    weights = single.state_dict()
    # Replicas see only their half of the batches: their running statistics cannot be those of one process.
    compared = [key for key in weights if dp == 1 or ("running_" not in key and "num_batches" not in key)]
    whole = torch.cat([named[key].flatten() for key in sorted(named)])
    ours = torch.cat([gradients[key].flatten() for key in sorted(named)])
    return {
        "case": case,
        "same_names": sorted(gradients) == sorted(named) and list(state) == list(weights),
        "gradient": relative(ours, whole),
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
        "weights": max(relative(state[key].double(), weights[key].double()) for key in compared),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        result = run(case, int(os.environ.get("STEPS", "20")))
        if result is not None:
            print(json.dumps(result), flush=True)
