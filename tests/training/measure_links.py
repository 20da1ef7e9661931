"""Run as several ranks: prints what each of them takes the links for.

A reduction lasts 50 ms at least here, and who has waited for 3 ms takes 20 ms more to wake up.
"""

import json
import time

import torch.distributed as dist

from optc.training import distributed
from optc.training.gradients import measure_reduction

reduce, receive = dist.all_reduce, dist.recv


def slow(*arguments, **options):
    time.sleep(0.05)
    return reduce(*arguments, **options)


def sleepy(*arguments, **options):
    start = time.perf_counter()
    result = receive(*arguments, **options)
    if time.perf_counter() > start + 0.003:
        time.sleep(0.02)
    return result


dist.all_reduce, dist.recv = slow, sleepy
distributed.initialize(60)
measured = json.dumps([*distributed.measure_link(repeats=3), measure_reduction(repeats=3)])
# All ranks write to the same pipe: a line and its end at once.
print(measured + "\n", end="", flush=True)
dist.barrier()
