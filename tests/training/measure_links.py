"""Run as several ranks: prints what each of them takes the links for, where a reduction lasts 50 ms at least."""

import json
import time

import torch.distributed as dist

from optc.training import distributed
from optc.training.gradients import measure_reduction

reduce = dist.all_reduce


def slow(*arguments, **options):
    time.sleep(0.05)
    return reduce(*arguments, **options)


dist.all_reduce = slow
distributed.initialize(60)
print(json.dumps([*distributed.measure_link(repeats=3), measure_reduction(repeats=3)]), flush=True)
dist.barrier()
