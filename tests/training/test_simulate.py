from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.errors import UsageError
from optc.training.schedules import SCHEDULES, actions, find, in_flight, peak_bytes
from optc.training.simulate import StageTimes, simulate

NAMES = [schedule.name for schedule in SCHEDULES]


@given(
    st.sampled_from(["GPipe", "1F1B"]),
    st.integers(2, 8),
    st.integers(0, 20),
    st.fractions(min_value=Fraction(1, 100), max_value=10),
    st.fractions(min_value=Fraction(1, 100), max_value=10),
)
def test_even_stages_have_the_bubble_of_the_textbook(name, pp, more, forward, backward):
    microbatches = pp + more
    stages = [StageTimes(forward, backward, Fraction(0))] * pp
    timeline = simulate(find(name), pp, microbatches, stages)
    assert timeline.seconds == (microbatches + pp - 1) * (forward + backward)
    assert timeline.bubble == Fraction(pp - 1, microbatches + pp - 1)


def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank():
    for pp, microbatches in ((2, 4), (4, 8), (4, 16)):
        timeline = simulate(find("Interleaved1F1B"), pp, microbatches, [StageTimes(1, 1, 1)] * 2 * pp)
        # pp - 1 bubbles of a half stage instead of a whole one; a whole stage takes 2 * 3 here
        assert timeline.seconds == (2 * microbatches + pp - 1) * 3


def test_zero_bubble_schedules_wait_less_than_interleaving():
    stages = [StageTimes(1, 1, 1)] * 8
    seconds = {name: simulate(find(name), 4, 8, stages).seconds for name in NAMES[2:]}
    assert seconds["ZBVZeroBubble"] <= seconds["InterleavedZeroBubble"] < seconds["Interleaved1F1B"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pp", "microbatches"), [(1, 4), (2, 2), (2, 4), (4, 8)])
def test_every_microbatch_goes_through_every_stage_once(name, pp, microbatches):
    schedule = find(name)
    listed = [action for rank in actions(schedule, pp, microbatches) for action in rank]
    assert len(listed) == len(set(listed))
    for stage in range(schedule.stages(pp)):
        kinds = [a.kind for a in listed if a.stage == stage]
        assert kinds.count("F") == microbatches
        assert kinds.count("B") + kinds.count("W") == microbatches
        assert kinds.count("B") + kinds.count("I") == microbatches
    for rank, order in enumerate(actions(schedule, pp, microbatches)):
        assert {action.stage for action in order} == set(schedule.stages_of(rank, pp))


def test_communication_delays_the_next_stage():
    assert simulate(find("GPipe"), 2, 1, [StageTimes(1, 1, 0, send=5, send_back=7), StageTimes(1, 1, 0)]).seconds == 16


def test_stages_of_one_rank_need_no_communication():
    stages = [StageTimes(1, 1, 0, send=100, send_back=100)] * 4
    schedule = find("ZBV")
    order = [event.action for event in simulate(schedule, 2, 4, stages).events if event.rank == 1]
    assert order[0].stage == 1
    # stages 1 and 2 are both on rank 1: 100 for stage 0 to 1, and the same for 2 to 3 and both ways back
    first = simulate(schedule, 2, 2, stages).seconds
    assert 400 < first < 800


def test_live_microbatches():
    assert in_flight(actions(find("GPipe"), 4, 8), 4) == [8, 8, 8, 8]
    assert in_flight(actions(find("1F1B"), 4, 8), 4) == [4, 3, 2, 1]
    assert peak_bytes(actions(find("1F1B"), 4, 8)[1], 10.0, [0, 5, 0, 0]) == 25.0


def test_names_of_schedules():
    assert find("interleaved 1f1b").name == "Interleaved1F1B"
    assert find("gpipe").name == "GPipe"
    assert find("ZBV").v_shaped
    with pytest.raises(UsageError, match="there is no schedule 'best'"):
        find("best")


def test_impossible_numbers_are_errors():
    with pytest.raises(UsageError, match="at least 4 microbatches"):
        actions(find("1F1B"), 4, 3)
    with pytest.raises(UsageError, match="multiple"):
        actions(find("Interleaved1F1B"), 2, 5)
