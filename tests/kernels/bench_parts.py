"""What the tests of the benchmark share: clocks that a test moves, rates, a GPU's description."""

import torch

from flatq_cli.kernels.bench_report import Rates

CPU = torch.device("cpu")
RATES = Rates(copy=1e12, float16=1e14, int8=2e14, int4=4e14)


class Watch:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class ScriptedClock:
    """Each call lasts as long as it says; replays last as long as their calls."""

    def __init__(self, watch, l2_bytes=1000, captured_share=1.0):
        self.watch, self.l2_bytes, self.runs, self.captured_share = watch, l2_bytes, 0, captured_share

    def once(self, call):
        self.runs += 1
        seconds = call()
        self.watch.now += seconds
        return seconds

    def prepare(self, calls):
        self.captured = list(calls)
        return lambda: sum(call() for call in calls) * self.captured_share


def device():
    return {
        "name": "NVIDIA GeForce RTX 4090",
        "arch": 89,
        "multiprocessors": 128,
        "driver": "1",
        "torch": "2",
        "cupy": "14",
        "nvrtc": "13.0",
    }
