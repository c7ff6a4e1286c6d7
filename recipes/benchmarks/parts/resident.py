"""Resident memory of this process, as the Linux kernel records it."""

import ctypes
import gc
from pathlib import Path


def resident(field: str) -> int:
    """Return bytes of resident memory: current (`VmRSS`) or peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def release() -> None:
    """Return unused memory to the kernel, so that the next allocations show."""
    gc.collect()
    # The C library keeps what is freed.
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Reset the kernel's record of the peak to the current memory."""
    Path("/proc/self/clear_refs").write_text("5")
