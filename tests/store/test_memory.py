"""A peak is that of the work since the last look, and looking starts nothing."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from flatq_cli.store import memory
from flatq_cli.store.memory import Peak, take_peak

MIB = 2**20
linux = pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the mark can be set back on Linux only")


def touch(mebibytes: int) -> None:
    """Make so much memory resident, and give it back."""
    block = bytearray(mebibytes * MIB)
    block[::4096] = b"x" * len(range(0, len(block), 4096))


@linux
def test_a_peak_is_that_of_the_work_since_the_last_look():
    take_peak()
    touch(200)
    large = take_peak().resident
    touch(20)
    small = take_peak().resident
    assert large - small > 150 * MIB
    assert small > MIB


def test_where_the_mark_stays_the_peak_only_rises(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "such")
    touch(200)
    large = take_peak().resident
    assert take_peak().resident >= large > 200 * MIB


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_proc_the_process_says_its_peak_in_its_own_unit(monkeypatch, tmp_path, platform, unit):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "such")
    monkeypatch.setattr(sys, "platform", platform)
    usage = ModuleType("resource")
    usage.RUSAGE_SELF, usage.getrusage = 0, lambda who: SimpleNamespace(ru_maxrss=7000)
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert take_peak().resident == 7000 * unit
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 1 kB\n")  # a kernel that keeps no mark
    assert take_peak().resident == 7000 * unit


def test_on_windows_psutil_says_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "such")
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5000))
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert take_peak().resident == 5000


class Gpus:
    """Stands for torch.cuda with two GPUs."""

    def __init__(self, initialized: bool) -> None:
        self.initialized, self.peaks = initialized, [300, 500]
        self.is_initialized, self.device_count = lambda: initialized, lambda: 2

    def max_memory_allocated(self, device: int) -> int:
        assert self.initialized
        return self.peaks[device]

    def reset_peak_memory_stats(self, device: int) -> None:
        assert self.initialized
        self.peaks[device] = 10


def test_of_gpus_the_fullest_counts_and_its_mark_is_set_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Gpus(initialized=True)))
    assert [take_peak().gpu, take_peak().gpu] == [500, 10]


def test_a_gpu_that_is_not_in_use_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Gpus(initialized=False)))
    assert take_peak().gpu is None


def test_looking_imports_no_torch():
    code = "import sys; from flatq_cli.store.memory import take_peak; take_peak(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_larger_of_two_peaks_is_that_of_each_kind():
    assert Peak(3, None).or_larger(Peak(2, 5)) == Peak(3, 5)
    assert Peak().or_larger(Peak()) == Peak(None, None)
