from time import sleep

from optc.timing import Timing, alternate


def test_contestants_take_turns():
    calls = []
    timings = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, warmup=1, min_runs=3
    )
    assert calls == ["a", "b"] * 4
    assert [len(t.samples) for t in timings] == [3, 3]


def test_the_slower_one_takes_longer():
    fast, slow = alternate({"fast": lambda: None, "slow": lambda: sleep(0.002)}, seconds=0.01)
    assert slow.median >= 2.0 > fast.median


def test_percentiles():
    timing = Timing("x", (1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.percentile(0) == 1.0
    assert timing.describe()["runs"] == 5
