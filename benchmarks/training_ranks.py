"""Run by torchrun from benchmarks/training.py: plans, trains and times one model in several ways, in turns."""

import argparse
import json
import statistics
import time

import sleeping
import torch
import torch.distributed as dist

from optc.training import Trainer, costs_of, distributed, plan
from optc.training.gradients import measure_reduction
from optc.training.overhead import measure_overhead, measure_split_overhead
from optc.training.planner import rank


def mean_square(output, target):
    return (output - target).square().mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("choices", nargs="+", help="pp:dp:schedule:data_parallel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=8, help="of the whole step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, example = sleeping.build(options.model)
    distributed.initialize(120)
    (latency, bandwidth), reduction = distributed.measure_link(), measure_reduction()
    overhead, split_overhead = measure_overhead(), measure_split_overhead()
    costs = costs_of(module, example)
    runs = []
    for text in options.choices:
        pp, dp, schedule, kind = text.split(":")
        fixed = {"pp": int(pp), "dp": int(dp), "schedule": schedule, "data_parallel": kind, "recompute": False}
        fixed |= {"microbatches": options.microbatches // int(dp), "latency": latency, "bandwidth": bandwidth}
        fixed |= {"reduce_bandwidth": reduction, "overhead": overhead, "split_overhead": split_overhead}
        made = plan(module, example, fixed, costs=costs)
        trainer = Trainer(module, mean_square, made, lambda p: torch.optim.SGD(p, lr=1e-3), timeout=120)
        batch = torch.cat([example] * made.microbatches)
        trainer.step(batch, batch)
        runs.append((text, made, trainer, batch, []))
    for _ in range(options.rounds):
        for _, _, trainer, batch, times in runs:
            dist.barrier()
            start = time.perf_counter()
            trainer.step(batch, batch)
            dist.barrier()
            times.append(time.perf_counter() - start)
    # Rank 0 has made the plans, the others have got them.
    best_first = list(rank([made.best for _, made, *_ in runs])) if dist.get_rank() == 0 else []
    for text, made, trainer, _, times in runs:
        trainer.close()
        if dist.get_rank() == 0:
            result = {"choice": text, "measured": statistics.median(times), "simulated": made.seconds, "times": times}
            result["place"] = next(place for place, best in enumerate(best_first) if best is made.best)
            result |= {"reduce_bandwidth": reduction, "overhead": overhead, "split_overhead": split_overhead}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
