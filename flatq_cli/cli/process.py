"""Settings of the process itself that make CPU work faster; results do not depend on them."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_IN_HEAP = 32 << 20  # what glibc allows


def keep_freed_memory() -> None:
    """Let malloc keep freed blocks of up to 32 MiB for the next tensor, in place of handing them back to the system.

    Intermediate tensors of a training step are a few MB each. glibc by default returns their pages when they are freed
    and takes them, zeroed, at the next allocation: hundreds of thousands of page faults in every step. Larger blocks
    still go back at once. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.mallopt(_TOP_PAD, 64 << 20)
