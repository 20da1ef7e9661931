from time import sleep

from optc.timing import BLOCK, Timing, alternate


def test_contestants_take_turns():
    calls = []
    contestants = {name: lambda name=name: (calls.append(name), sleep(BLOCK)) for name in "ab"}
    timings = alternate(contestants, seconds=0.0, warmup=1, min_runs=3)
    # Warm-up, then in each turn one run that does not count and one that fills the block.
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert [len(t.samples) for t in timings] == [3, 3]


def test_the_slower_one_takes_longer():
    fast, slow = alternate({"fast": lambda: None, "slow": lambda: sleep(0.002)}, seconds=0.01)
    assert slow.median >= 2.0 > fast.median


def test_percentiles():
    timing = Timing("x", (1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.percentile(0) == 1.0
    assert timing.describe()["runs"] == 5
