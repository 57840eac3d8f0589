"""Timing of GPU work within a budget: the median of CUDA-graph replays on rotating copies of the data.

A kernel of 5 µs cannot be timed by itself: events and launches cost as much. So calls are captured into one CUDA graph
until it lasts long enough, and each call uses another copy of the data, as many as it takes to be larger than the L2
cache together; the time of a replay divided by its calls is what a call costs inside a captured decode step. What the
clock is (CUDA events, or the CPU's in the tests) is an argument; everything else here is arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol, TypeAlias

import torch

Call: TypeAlias = Callable[[], object]

MAX_COPIES = 24
REPLAY_SECONDS = 4e-4
MAX_CALLS = 48
REPLAYS, FEWEST_REPLAYS = 15, 3


class Budget:
    """Seconds that may be spent. Where they get short, measurements are repeated less, and then left out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def replays(self, seconds: float, share: float) -> int:
        """How often to repeat what takes `seconds`, if it may have `share` seconds of the budget."""
        return max(FEWEST_REPLAYS, min(REPLAYS, int(share / max(seconds, 1e-9))))


def copies_needed(bytes_of_one: float, l2_bytes: int) -> int:
    """Copies of a call's data that are larger than twice the L2 cache together, within reason; at least 2."""
    return max(2, min(MAX_COPIES, int(2 * l2_bytes / max(bytes_of_one, 1)) + 1))


def calls_in_a_replay(seconds: float, copies: int) -> int:
    """Calls to capture together: whole rounds over the copies, until a replay lasts long enough."""
    wanted = min(MAX_CALLS, max(1, int(REPLAY_SECONDS / max(seconds, 1e-9)) + 1))
    return max(1, -(-wanted // copies)) * copies if wanted > 1 else copies


class Clock(Protocol):
    """How calls are timed."""

    l2_bytes: int

    def once(self, call: Call) -> float:
        """Run a call, wait for it, and say how long it took."""
        ...

    def prepare(self, calls: Sequence[Call]) -> Call:
        """One call that does all of them in turn."""
        ...

    def wait(self) -> None:
        """Until nothing runs any more. Raises RuntimeError where the device can run nothing any more."""
        ...


@dataclass
class EventClock:
    """CUDA events and graphs, on one device. What cannot be captured is run call by call."""

    device: torch.device
    l2_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def once(self, call: Call) -> float:
        make: Any = torch.cuda.Event
        start, end = make(enable_timing=True), make(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def prepare(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = []
        try:
            with torch.cuda.graph(graph):
                kept += [call() for call in calls]
        except RuntimeError as error:
            self.notes.append(f"not captured: {str(error).splitlines()[0]}")
            torch.cuda.synchronize(self.device)
            return lambda: [call() for call in calls]
        # The outputs are held, or all calls would write to one place, which stays in L2 and costs no bandwidth.
        return partial(_replay, graph, kept)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def _replay(graph: Any, kept: Sequence[object]) -> None:
    graph.replay()


@dataclass
class WallClock:
    """The CPU's clock: the tests run the benchmark's own path with it."""

    l2_bytes: int = 1

    def once(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def prepare(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def wait(self) -> None:
        """Calls end before they return."""


def time_calls(
    make: Callable[[], Call], bytes_of_one: float, clock: Clock, budget: Budget, share: float
) -> float | None:
    """Median seconds of a call, or None where the budget is spent.

    Args:
        make: gives the call on data of its own.
        bytes_of_one: that a call touches.
        share: seconds that this measurement may take, its preparation not counted.
    """
    if budget.left <= 0:
        return None
    calls = [make() for _ in range(copies_needed(bytes_of_one, clock.l2_bytes))]
    for call in calls[:2]:
        clock.once(call)  # compiles, loads, chooses algorithms
    estimate = min(clock.once(call) for call in calls[:2])
    together = calls_in_a_replay(estimate, len(calls))
    replay = clock.prepare([calls[index % len(calls)] for index in range(together)])
    clock.once(replay)  # the first replay uploads the graph
    seconds = clock.once(replay)
    # Call by call, launching may cost more than the work: only a replay tells how many calls make a long one.
    enough = calls_in_a_replay(seconds / together, len(calls))
    if enough > together:
        together = enough
        replay = clock.prepare([calls[index % len(calls)] for index in range(together)])
        clock.once(replay)
        seconds = clock.once(replay)
    times = [clock.once(replay) for _ in range(budget.replays(seconds, share))]
    return median(times) / together
