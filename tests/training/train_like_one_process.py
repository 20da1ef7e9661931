"""Run by torchrun: trains models over all ranks and compares with the same training in one process.

Arguments are cases `model:pp:dp:schedule:data_parallel`; a line of JSON per case is printed by rank 0. The reference
sees the same microbatches and sums in the same order: batch normalization depends on them, and every rounding.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import training_models as models

from optc.training import Trainer, distributed, plan
from optc.training.overhead import measure_overhead, measure_split_overhead

MICROBATCHES, SIZE = 8, 2


def make_optimizer(parameters):
    # Not Adam: where a gradient is zero but for rounding (the bias of attention keys) it takes steps of random sign.
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def reference(module, inputs, targets, loss_fn, steps, parts, replicas):
    """Train ``module`` in one process; its losses, and its gradients of the first step.

    Gradients are summed over the microbatches of each replica first: where a ReLU flips, another order of sums ends
    at other weights.
    """
    optimizer = make_optimizer(module.parameters())
    losses, gradients = [], {}
    for _ in range(steps):
        total, sums = 0.0, []
        for index in range(parts):
            if index % (parts // replicas) == 0:
                optimizer.zero_grad()
                sums.append(None)
            part = [tensor.tensor_split(parts)[index] for tensor in inputs]
            loss = loss_fn(module(*part), targets.tensor_split(parts)[index]) / (parts // replicas)
            loss.backward()
            total += float(loss.detach()) / replicas
            sums[-1] = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        for name, parameter in module.named_parameters():
            if name in sums[0]:
                parameter.grad = sum(found[name] for found in sums) / replicas
        gradients = gradients or {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(total)
    return losses, gradients


def worst(found, wanted):
    """Largest relative error of a tensor. Small ones, such as gradients that are zero but for the rounding of others,
    are compared with a hundredth of all tensors together."""
    whole = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in wanted.values()))
    return max(
        float((found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(whole / 100))
        for name, tensor in wanted.items()
    )


def run(case, steps, overhead):
    name, pp, dp, schedule, kind = case.split(":")
    pp, dp = int(pp), int(dp)
    microbatches = MICROBATCHES // dp
    module, inputs, targets, loss_fn = models.build(name, MICROBATCHES * SIZE)
    cluster = {"pp": pp, "dp": dp, "schedule": schedule, "microbatches": microbatches, "data_parallel": kind}
    cluster["overhead"], cluster["split_overhead"] = overhead
    # Two stages on one device would not be split by speed alone: any costs do, as long as all ranks agree.
    made = plan(module, tuple(tensor[:SIZE] for tensor in inputs), cluster, costs="roofline")
    trainer = Trainer(module, loss_fn, made, make_optimizer, timeout=500)
    share = slice(trainer.world.dp_rank * microbatches * SIZE, (trainer.world.dp_rank + 1) * microbatches * SIZE)
    mine, wanted = tuple(tensor[share] for tensor in inputs), targets[share]
    losses = [trainer.step(mine, wanted)]
    gradients = trainer.gradients()
    losses += [trainer.step(mine, wanted) for _ in range(steps - 1)]
    state = trainer.state_dict()
    everyone = [None] * (pp * dp)
    kept = {name: float(tensor.double().sum()) for name, tensor in trainer._weights.frozen.items()}
    dist.all_gather_object(everyone, kept)
    trainer.close()
    if trainer.world.rank != 0:
        return None
    start, single = module.state_dict(), copy.deepcopy(module)
    expected, named = reference(single, inputs, targets, loss_fn, steps, MICROBATCHES, dp)
    after = single.state_dict()
    learned = dict(single.named_parameters())
    # Replicas see only their half of the batches: their running statistics cannot be those of one process.
    buffers = {name: tensor for name, tensor in after.items() if name not in learned} if dp == 1 else {}
    return {
        "case": case,
        "cuts": list(made.cuts),
        "same_names": sorted(gradients) == sorted(named) and list(state) == list(after),
        "gradient": worst(gradients, named) if sorted(gradients) == sorted(named) else math.inf,
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
        "weights": worst(state, {name: after[name] for name in learned}),
        # Of what was learned alone. Rounding of the weights is larger beside it than beside the weights.
        "update": worst({n: state[n] - start[n] for n in learned}, {n: after[n] - start[n] for n in learned}),
        "buffers": worst(state, buffers) if buffers else 0.0,
        "same_replicas": all(everyone[rank] == everyone[rank % pp] for rank in range(pp * dp)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.initialize()
    overhead = measure_overhead(), measure_split_overhead()
    assert 1e-6 < overhead[0] < 0.1 and 0 <= overhead[1] < 0.1
    assert distributed.agree(overhead) == overhead
    for case in sys.argv[1:]:
        result = run(case, int(os.environ.get("STEPS", "20")), overhead)
        if result is not None:
            print(json.dumps(result), flush=True)
