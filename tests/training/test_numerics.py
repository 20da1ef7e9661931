"""Training over several ranks equals training in one process: one run for many cases."""

import json

import pytest

# Every model, every schedule, 2 and 4 stages, replicas and FSDP; all combinations: benchmarks/training.py --numerics.
FOUR_RANKS = [
    "mlp:4:1:GPipe:ddp",
    "resnet:4:1:1F1B:ddp",
    "unet:4:1:ZBVZeroBubble:ddp",
    "gpt:4:1:Interleaved1F1B:ddp",
    "encoder_decoder:4:1:InterleavedZeroBubble:ddp",
    "gpt2:2:2:1F1B:fsdp",
    "gpt:2:2:ZBVZeroBubble:fsdp",
    "unusual:4:1:1F1B:ddp",
    "unusual:4:1:InterleavedZeroBubble:ddp",
    "resnet:2:2:GPipe:ddp",
    "encoder_decoder:1:4:1F1B:fsdp",
]
TWO_RANKS = ["llama:2:1:1F1B:ddp", "bert:2:1:ZBVZeroBubble:ddp", "gpt:2:1:InterleavedZeroBubble:ddp"]


@pytest.mark.parametrize(("count", "cases"), [(4, FOUR_RANKS), (2, TWO_RANKS)])
def test_gradients_and_steps_equal_one_process(ranks, count, cases):
    _, output = ranks(count, "train_like_one_process.py", *cases, env={"STEPS": "3"})
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [result["case"] for result in results] == cases, output[-3000:]
    for result in results:
        assert result["same_names"] and result["same_replicas"], result
        # Sums in another order are all that may differ.
        for name in ("gradient", "loss", "weights", "buffers"):
            assert result[name] < 1e-5, result
        assert result["update"] < 1e-4, result
