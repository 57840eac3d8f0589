"""How often what is timed runs, and what the time of one call is."""

import pytest

from flatq_cli.kernels import bench_timing
from flatq_cli.kernels.bench_timing import Budget, time_calls
from tests.kernels.bench_parts import ScriptedClock, Watch


def test_copies_are_larger_than_the_cache_together():
    assert bench_timing.copies_needed(100, 1000) * 100 > 2000
    assert bench_timing.copies_needed(1e9, 1000) == 2
    assert bench_timing.copies_needed(1, 10**9) == bench_timing.MAX_COPIES


@pytest.mark.parametrize("seconds", [1e-7, 5e-6, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("copies", [2, 7, 24])
def test_a_replay_uses_every_copy_equally_and_lasts_long_enough(seconds, copies):
    calls = bench_timing.calls_in_a_replay(seconds, copies)
    assert calls % copies == 0
    assert calls * seconds >= min(bench_timing.REPLAY_SECONDS, bench_timing.MAX_CALLS * seconds)
    assert calls <= bench_timing.MAX_CALLS + copies


def test_the_time_of_a_call_is_a_replays_over_its_calls():
    watch = Watch()
    clock = ScriptedClock(watch)
    made = []
    seconds = time_calls(lambda: made.append(1) or (lambda: 5e-6), 100, clock, Budget(100, watch), share=1.0)
    assert seconds == pytest.approx(5e-6)
    assert len(made) == len(set(map(id, clock.captured))) == 21


def test_calls_that_cost_more_to_launch_than_to_run_are_captured_again_in_greater_number():
    watch = Watch()
    clock = ScriptedClock(watch, captured_share=0.01)
    seconds = time_calls(lambda: lambda: 1e-3, 1e9, clock, Budget(100, watch), share=1.0)
    assert seconds == pytest.approx(1e-5)
    assert len(clock.captured) >= 0.8 * bench_timing.REPLAY_SECONDS / 1e-5


def test_a_spent_budget_measures_nothing_and_a_short_one_repeats_less():
    watch = Watch()
    assert time_calls(lambda: lambda: 1.0, 1, ScriptedClock(watch), Budget(0, watch), 1.0) is None
    budget = Budget(100, watch)
    assert budget.replays(0.01, share=1.0) == bench_timing.REPLAYS
    assert budget.replays(0.1, share=1.0) == 10
    assert budget.replays(9.0, share=1.0) == bench_timing.FEWEST_REPLAYS
    watch.now += 60
    assert budget.left == pytest.approx(40)
