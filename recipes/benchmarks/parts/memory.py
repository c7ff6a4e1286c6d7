"""What a step computes and keeps: FLOPs, tensors saved for backward, gradients, optimizer state, peaks."""

import itertools
import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from recipes.benchmarks.parts.models import tiny
from recipes.benchmarks.parts.setting import Setting, device
from recipes.benchmarks.parts.training import Training

Start = Callable[[nn.Module, Setting], Any]


def account(training: Training, tokens: Tensor) -> dict[str, int]:
    """Take one step and count.

    `saved_bytes`: what forward leaves behind, so what autograd keeps for backward. `live_bytes`: all tensors that exist
    at the step's peak, weights and optimizer state included.
    """
    state = tensors_of_optimizer(training)
    held = storages([*training.model.parameters(), *training.model.buffers(), *state])
    with FlopCounterMode(display=False) as counter:
        with profile(profile_memory=True) as forward:
            loss = training.loss(tokens)
        with profile(profile_memory=True) as backward:
            loss.backward()
        gradients = sum(tensor.grad.nbytes for tensor in training.parameters)
        with profile(profile_memory=True) as update:
            training.update()
    levels = list(itertools.accumulate(change for part in (forward, backward, update) for change in changes(part)))
    return {
        "trainable": training.trainable,
        "flops": counter.get_total_flops(),
        "saved_bytes": sum(changes(forward)),
        "gradient_bytes": gradients,
        "optimizer_bytes": sum(tensor.nbytes for tensor in state),
        "live_bytes": sum(held.values()) + max(levels),
    }


def tensors_of_optimizer(training: Training) -> list[Tensor]:
    """Its state on the device; counts of steps lie elsewhere."""
    states = training.optimizer.state.values() if training.optimizer else ()
    return [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind tensors; a sparse tensor has those of its parts."""
    found = {}
    for tensor in tensors:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        found |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return found


def changes(profiler: profile) -> list[int]:
    """Bytes allocated (or freed, below zero) on the device by each event of a profile, in order of time."""
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == device()
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peaks(starts: Mapping[Hashable, Start], setting: Setting) -> dict[Hashable, int]:
    """`peak_bytes` of each of what is started, in a process of its own."""
    # Processes are forked from a server that has imported this module and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        running = {name: pool.submit(peak_bytes, start, setting) for name, start in starts.items()}
        return {name: peak.result() for name, peak in tqdm(running.items(), "memory")}


def peak_bytes(start: Start, setting: Setting) -> int:
    """Most memory of a step above the plain model's: allocated on the GPU, or else resident (Linux).

    Args:
        start: makes of a plain model what has a `step`; picklable.
    """
    # Code that is loaded on first use is none of it.
    small = Setting(tiny(2), setting.dtype, 1, 8)
    start(small.build(), small).step(small.tokens())
    model, tokens = setting.build(), setting.tokens()
    plain = torch.cuda.memory_allocated() if device() == "cuda" else resident("VmRSS")
    started = start(model, setting)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        started.step(tokens)
        return torch.cuda.max_memory_allocated() - plain
    # The kernel's record of the peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    started.step(tokens)
    return resident("VmHWM") - plain


def resident(field: str) -> int:
    """Bytes of resident memory: now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
