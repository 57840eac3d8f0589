"""How much memory a piece of work needed: the peak between two looks at it.

The kernel keeps a process's high-water mark of resident memory, and Linux lets a process set its own back, so each
piece of work gets a peak of its own. Elsewhere the mark only rises, and a piece of work is told the peak of all before
it too: never too little. PyTorch counts what it allocates on a GPU in the same way. It is asked only where it is at
work already: looking must not import it, nor start CUDA.

Resident memory counts files that are mapped, such as a model's weights, as far as they were read.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""What sets the mark back to what is resident now (man 5 proc_pid_clear_refs)."""


class Peak(NamedTuple):
    """Bytes: resident, and on the GPU that had most; None where that is not known or not used."""

    resident: int | None = None
    gpu: int | None = None

    def or_larger(self, other: Peak) -> Peak:
        """The larger of each, of what is known."""
        return Peak(_larger(self.resident, other.resident), _larger(self.gpu, other.gpu))


def take_peak() -> Peak:
    """The peak since the last call (or since the process began); the next one starts from what is in use now."""
    peak = Peak(_resident_peak(), _gpu_peak())
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark stays
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    return peak


def _resident_peak() -> int | None:
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return _peak_so_far()
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return sizes[0] if sizes else _peak_so_far()


def _peak_so_far() -> int | None:
    """The process's peak where nothing can be set back."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else int(peak)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _gpu_peak() -> int | None:
    """What PyTorch had allocated at most on one GPU; sets its mark back."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    peak = max((torch.cuda.max_memory_allocated(device) for device in devices), default=0)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    return int(peak) or None


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
