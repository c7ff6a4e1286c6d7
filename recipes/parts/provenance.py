"""The facts that every report states: command, hardware, versions and peak memory."""

import os
import platform
import resource
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(module: str, packages: Iterable[str]) -> dict:
    """Return how a result was made: the command that runs `module`, the hardware and the versions of packages."""
    return {"command": command(module), "hardware": hardware(), "versions": versions(packages)}


def command(module: str) -> str:
    """Return the command line of this process, which runs `module`. Absolute paths are cut to their last part."""
    return shlex.join(["python", "-m", module, *map(without_folder, sys.argv[1:])])


def without_folder(word: str) -> str:
    """Return the last part of an absolute path, and any other word unchanged."""
    return Path(word).name if os.path.isabs(word) else word


def hardware() -> str:
    """Name the GPUs, or the processor and its threads in use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def peak_memory_bytes() -> int:
    """Return the peak memory of this process so far: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
