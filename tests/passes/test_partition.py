import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.errors import PartitionError
from optc.passes.partition.balance import balance, equal_layer_cuts, lower_bound
from optc.passes.partition.chain import Chain, Device, Link, segments
from optc.passes.partition.coarsen import coarsen
from optc.passes.partition.dynamic import crossing_seconds
from optc.passes.partition.memory import MemoryModel
from optc.passes.partition.split import split, stage_seconds
from optc.passes.partition.weights import Weight


def chain_of(seconds, *, sent=None, saved=None, legal=None, weights=()):
    n = len(seconds)
    seconds = np.asarray(seconds, float)
    crossing = np.zeros(n + 1) if sent is None else np.asarray(sent, float)
    return Chain(
        names=tuple(f"n{i}" for i in range(n)),
        forward=seconds / 3,
        backward_input=seconds / 3,
        backward_weight=seconds / 3,
        saved=np.zeros(n) if saved is None else np.asarray(saved, float),
        sent=crossing,
        returned=crossing,
        messages=(crossing > 0).astype(float),
        legal=np.ones(n + 1, bool) if legal is None else np.asarray(legal, bool),
        weights=tuple(weights),
    )


def random_chain(rng, n):
    weights = []
    for index in range(int(rng.integers(0, n))):
        users = sorted(set(rng.integers(0, n, size=int(rng.integers(1, 4))).tolist()))
        weights.append(Weight(f"w{index}", int(rng.integers(1, 100)), bool(rng.integers(0, 2)), tuple(users)))
    legal = rng.random(n + 1) < 0.8
    return chain_of(rng.random(n), sent=rng.random(n + 1) * 50, saved=rng.random(n) * 30, legal=legal, weights=weights)


def brute_force(chain, devices, link, in_flight, memory):
    """Every set of legal cuts, memory counted by its definition instead of by differences of sums."""
    best = np.inf
    n = len(chain.names)
    legal = [p for p in range(1, n) if chain.legal[p]]
    for cuts in itertools.combinations(legal, len(devices) - 1):
        fits = all(
            memory.total(chain, a, b, live) <= device.memory
            for (a, b), live, device in zip(segments(cuts, len(chain.names)), in_flight, devices, strict=True)
        )
        if fits:
            best = min(best, max(stage_seconds(chain, cuts, devices, link)))
    return best


def split_as_good(reference, chain, devices, link, in_flight, memory):
    """The split, whose slowest stage is as fast as that of ``reference``; None where neither finds one."""
    expected = reference(chain, devices, link, in_flight, memory)
    if not np.isfinite(expected):
        with pytest.raises(PartitionError):
            split(chain, devices, link, in_flight=in_flight, memory=memory)
        return None
    found = split(chain, devices, link, in_flight=in_flight, memory=memory)
    assert found.bottleneck == pytest.approx(expected, rel=1e-9)
    return found


@pytest.mark.parametrize("seed", range(200))
def test_the_split_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    chain = random_chain(rng, int(rng.integers(4, 13)))
    count = int(rng.integers(2, 5))
    tight = rng.random() < 0.7
    devices = [
        Device(speed=float(rng.choice([0.5, 1.0, 2.0])), memory=float(rng.uniform(200, 1500)) if tight else np.inf)
        for _ in range(count)
    ]
    link = Link(latency=float(rng.random() * 0.05), bandwidth=float(rng.uniform(50, 5000)))
    in_flight = [int(v) for v in rng.integers(1, 5, size=count)]
    memory = MemoryModel(state=4.0, microbatches=int(rng.integers(1, 5)), recompute=bool(rng.integers(0, 2)))
    found = split_as_good(brute_force, chain, devices, link, in_flight, memory)
    if found is None:
        return
    for (a, b), live, device in zip(segments(found.cuts, len(chain.names)), in_flight, devices, strict=True):
        assert memory.total(chain, a, b, live) <= device.memory * (1 + 1e-9)


def recursion(chain, devices, link, in_flight, memory):
    """The time of the slowest stage by the plain recursion over all pairs of positions."""
    positions = [int(p) for p in chain.positions()]
    crossing = crossing_seconds(chain, link)
    best = {0: 0.0}
    for live, device in zip(in_flight, devices, strict=True):
        reached = {}
        for before, value in best.items():
            for at in positions:
                if at <= before or memory.total(chain, before, at, live) > device.memory:
                    continue
                time = chain.seconds[before:at].sum() / device.speed + crossing[before] + crossing[at]
                reached[at] = min(reached.get(at, np.inf), max(value, time))
        best = reached
    return best.get(positions[-1], np.inf)


@pytest.mark.parametrize("seed", range(8))
def test_what_bounds_leave_out_is_never_the_best(seed):
    """Chains long enough that a thinner one bounds them; memory between plenty and too little."""
    rng = np.random.default_rng(seed)
    chain = random_chain(rng, 95)
    assert len(chain.positions()) > 64
    devices = [
        Device(float(rng.choice([0.5, 1.0, 2.0])), float(rng.uniform(1e3, 1.2e4)) if seed % 4 else np.inf)
        for _ in range(4)
    ]
    link = Link(latency=float(rng.random() * 0.2), bandwidth=float(rng.uniform(50, 5000)))
    in_flight = [int(v) for v in rng.integers(1, 5, size=4)]
    memory = MemoryModel(state=4.0, microbatches=int(rng.integers(1, 5)), recompute=bool(rng.integers(0, 2)))
    split_as_good(recursion, chain, devices, link, in_flight, memory)


@pytest.mark.parametrize("stages", [10, 40, 79, 80])
def test_nearly_as_many_stages_as_units(stages):
    """A thinner chain cannot be cut into as many, so there is no bound."""
    seconds = np.random.default_rng(stages).random(80)
    found = split(chain_of(seconds, saved=np.ones(80)), [Device(memory=50.0)] * stages)
    assert len(found.cuts) == stages - 1
    assert found.bottleneck >= max(seconds.max(), seconds.sum() / stages) * (1 - 1e-9)
    assert stages < 79 or found.bottleneck <= 2 * seconds.max()


def test_cuts_are_legal_only():
    chain = chain_of([1, 1, 1, 1], legal=[1, 0, 0, 1, 1])
    assert split(chain, [Device()] * 2).cuts == (3,)


def test_a_slow_device_gets_less():
    chain = chain_of([1.0] * 12)
    assert split(chain, [Device(speed=1.0), Device(speed=2.0)]).cuts == (4,)


def test_communication_counts_at_both_sides_of_a_cut():
    chain = chain_of([1.0] * 4, sent=[0, 0, 10, 0, 0])
    assert split(chain, [Device()] * 2, Link(bandwidth=5.0)).bottleneck == 3.0


def test_a_shared_weight_counts_once_in_a_stage():
    weight = Weight("w", 100, True, (0, 3))
    chain = chain_of([1.0] * 4, weights=[weight])
    memory = MemoryModel(state=4.0)
    assert memory.fixed(chain, 0, 4) == 400
    assert memory.fixed(chain, 1, 4) == 400
    assert memory.fixed(chain, 1, 3) == 0


def test_too_few_cuts_is_an_error():
    with pytest.raises(PartitionError, match="2 stages at most, not into 3"):
        split(chain_of([1.0] * 3, legal=[1, 0, 1, 1]), [Device()] * 3)


def test_an_operator_too_large_for_a_stage_is_named():
    chain = chain_of([1.0] * 4, weights=[Weight("embedding", 100, True, (2,))])
    with pytest.raises(PartitionError, match=r"1 operators need more memory.*n2") as raised:
        split(chain, [Device(memory=300.0)] * 2)
    assert "shard" in raised.value.hint


def test_a_model_too_large_for_all_devices_is_an_error():
    weights = [Weight(f"w{i}", 100, True, (i,)) for i in range(4)]
    with pytest.raises(PartitionError, match="no split into 2 stages fits"):
        split(chain_of([1.0] * 4, weights=weights), [Device(memory=450.0)] * 2)


def test_memory_can_force_a_split_slower_than_the_even_one():
    weights = [Weight(f"w{i}", 100, True, (i,)) for i in range(3)]
    chain = chain_of([1.0] * 6, weights=weights)
    found = split(chain, [Device(memory=450.0), Device(memory=900.0)])
    assert found.cuts == (1,)
    assert found.bottleneck == 5.0


def test_coarsening_keeps_the_cheapest_cut_of_each_share():
    rng = np.random.default_rng(0)
    chain = chain_of(rng.random(5000), sent=rng.random(5001))
    coarse = coarsen(chain, 1000)
    assert len(coarse.positions()) <= 1002
    assert coarsen(coarse, 1000) is coarse
    devices, link = [Device()] * 8, Link(bandwidth=1.0)
    exact, approximate = split(chain, devices, link).bottleneck, split(coarse, devices, link).bottleneck
    assert exact <= approximate <= exact + 2 * chain.seconds.sum() / 1000


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 10), min_size=6, max_size=40), st.integers(2, 5))
def test_no_split_beats_the_lower_bound(seconds, count):
    chain, devices = chain_of(seconds), [Device()] * count
    assert split(chain, devices).bottleneck >= lower_bound(chain, devices) * (1 - 1e-9)


def test_balance_compares_with_equal_layers():
    chain = chain_of([1.0] * 8 + [8.0])
    devices = [Device()] * 2
    report = balance(chain, split(chain, devices), devices, Link(), starts=range(0, 8, 2))
    assert (report.bottleneck, report.bound, report.equal_layers) == (8.0, 8.0, 12.0)
    assert "equal layers would take 12000.000 ms (+50.0 %)" in report.lines()[1]


def test_equal_layers_need_as_many_layers_as_stages():
    assert equal_layer_cuts(chain_of([1.0] * 4), [0, 2], 3) is None
