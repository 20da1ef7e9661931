"""Training over several ranks, measured against the simulator, the planner and one process.

    python benchmarks/training.py --simulator     simulated and measured step times of every schedule
    python benchmarks/training.py --planner       the planner's choice and every other one, measured
    python benchmarks/training.py --numerics      gradients and 20 steps of every model, schedule and mesh
    python benchmarks/training.py --planning      seconds of a plan for 4,000 operators

The first two train models whose layers sleep, so that four ranks behave like four devices on fewer cores: what is
measured is the runtime, its communication and its waiting, not arithmetic. Results are appended to
docs/training.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "training.json"
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
MODELS = ("mlp", "resnet", "unet", "gpt", "encoder_decoder", "gpt2", "llama", "bert")
SIMULATED = ("even", "uneven")
PLANNED = ("heavy", "wide")
DEPTHS = ("48", "200")


def launch(ranks: int, script: Path, *arguments: str, timeout: float = 3000) -> list[dict]:
    """Run a script as ``ranks`` processes of this session; the JSON lines that they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), *arguments]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {script.name} failed")
    return [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]


def simulator(models: list[str]) -> list[dict]:
    found = []
    for model in models:
        choices = [f"4:1:{schedule}:ddp" for schedule in SCHEDULES]
        results = launch(4, HERE / "training_ranks.py", model, *choices, "--rounds", "15")
        for result in results:
            result["model"], result["error"] = model, result["simulated"] / result["measured"] - 1
            print(f"{model} {result['choice']}: measured {result['measured'] * 1e3:.0f} ms, {result['error']:+.1%}")
        for key, title in (("measured", "measured"), ("place", "ranked by the planner")):
            order = (result["choice"].split(":")[2] for result in sorted(results, key=lambda result: result[key]))
            print(f"{model} {title}, fastest first: {', '.join(order)}")
        for one, other in itertools.combinations(sorted(results, key=lambda result: result["measured"]), 2):
            if one["place"] > other["place"]:
                apart = other["measured"] / one["measured"] - 1
                print(f"{model}: {one['choice']} and {other['choice']} change places, {apart:.1%} apart")
        found += results
    return found


def planner(models: list[str]) -> list[dict]:
    found = []
    for model in models:
        choices = [f"{pp}:{4 // pp}:{s}:ddp" for pp, s in itertools.product((4, 2), SCHEDULES)] + ["1:4:1F1B:ddp"]
        results = launch(4, HERE / "training_ranks.py", model, *choices, "--rounds", "3")
        chosen = min(results, key=lambda result: result["place"])
        best = min(results, key=lambda result: result["measured"])
        for result in sorted(results, key=lambda result: result["measured"]):
            mark = " <- chosen" if result is chosen else ""
            print(
                f"{model} {result['choice']}: {result['measured'] * 1e3:.0f} ms, {result['simulated'] * 1e3:.0f}{mark}"
            )
        print(f"{model}: the choice is {chosen['measured'] / best['measured'] - 1:+.1%} of the best measured")
        found += [result | {"model": model} for result in results]
    return found


def numerics(models: list[str]) -> list[dict]:
    script = HERE.parent / "tests" / "training" / "train_like_one_process.py"
    found = []
    for model in models:
        four = [f"{model}:4:1:{s}:ddp" for s in SCHEDULES] + [f"{model}:2:2:{s}:fsdp" for s in SCHEDULES]
        two = [f"{model}:2:1:{s}:ddp" for s in SCHEDULES]
        results = launch(4, script, *four) + launch(2, script, *two)
        assert all(result["same_names"] for result in results), results
        names = ("gradient", "loss", "weights", "update", "buffers")
        listed = ", ".join(f"{name} {max(result[name] for result in results):.1e}" for name in names)
        print(f"{model}: largest relative errors of {len(results)} runs: {listed}", flush=True)
        found += results
    return found


def planning(models: list[str]) -> list[dict]:
    """Seconds of all choices for GPTs of so many layers on eight devices, from ample memory to what barely fits."""
    sys.path.insert(0, str(HERE.parent / "tests" / "training"))
    import torch
    import training_models

    from optc.errors import PartitionError
    from optc.training import cluster
    from optc.training.analysis import analyse
    from optc.training.capture import capture
    from optc.training.linearize import linearize
    from optc.training.planner import search
    from optc.training.roofline import Rates, estimate

    found = []
    for model in models:
        module = training_models.GPT(vocabulary=4096, width=64, depth=int(model), tied=False)
        start = perf_counter()
        program = capture(module, torch.zeros(2, 8, dtype=torch.long))
        layout = linearize(program, analyse(program))
        captured = perf_counter() - start
        rates = Rates(products=5e10, convolutions=5e10, memory=1e10, overhead=1e-6)
        chain = layout.chain(estimate(program, layout.facts, rates))
        weights = sum(weight.nbytes for weight in module.parameters())
        for share in (None, 0.6, 0.3, 0.2, 0.17, 0.15, 0.14, 0.13):
            # A device keeps weights, gradients and two states of the optimizer of its stage, and activations.
            given = {} if share is None else {"memory": share * 4 * weights}
            start = perf_counter()
            try:
                best = search(chain, cluster.read({"devices": 8, **given}), 2, 2.0).candidates[0].title()
            except PartitionError:
                best = "nothing fits"
            row = {"model": model, "operators": len(layout.units), "capture": captured, "memory": share}
            row |= {"seconds": perf_counter() - start, "best": best}
            print(f"{row['operators']} operators, memory {share}: {row['seconds']:.2f} s, {best}", flush=True)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("simulator", "planner", "numerics", "planning"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--model", action="append", help="only these; repeatable")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, run, models in (
        ("simulator", simulator, SIMULATED),
        ("planner", planner, PLANNED),
        ("numerics", numerics, MODELS),
        ("planning", planning, DEPTHS),
    ):
        if getattr(options, name):
            wanted = options.model or list(models)
            kept = [r for r in results.get(name, []) if (r.get("model") or r["case"].split(":")[0]) not in wanted]
            results[name] = kept + run(wanted)
            lists = (f'"{k}": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]" for k, rows in results.items())
            RESULTS.write_text("{\n" + ",\n".join(lists) + "\n}\n")


if __name__ == "__main__":
    main()
