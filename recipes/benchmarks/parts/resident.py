"""Resident memory of this process, as the Linux kernel records it."""

from pathlib import Path


def resident(field: str) -> int:
    """Return bytes of resident memory: current (`VmRSS`) or peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Set the kernel's record of the peak back to the current memory."""
    Path("/proc/self/clear_refs").write_text("5")
