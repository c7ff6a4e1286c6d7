"""FLOPs and memory of a step: tensors saved for backward, gradients, optimizer state, peaks."""

import itertools
import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from recipes.benchmarks.parts.models import tiny
from recipes.benchmarks.parts.quantised import flop_formulas, scales
from recipes.benchmarks.parts.resident import release, reset_peak, resident
from recipes.benchmarks.parts.setting import Setting, device
from recipes.benchmarks.parts.training import Training

Start = Callable[[nn.Module, Setting], Any]


def account(training: Training, tokens: Tensor) -> dict[str, int]:
    """Take one step and count its FLOPs and bytes.

    `saved_bytes`: what autograd keeps from forward for backward. `live_bytes`: all tensors alive at the step's peak,
    weights and optimizer state included.
    """
    state = tensors_of_optimizer(training)
    model = training.model
    held = storages([*model.parameters(), *model.buffers(), *scales(model), *state])
    formulas = flop_formulas() if training.setting.base else None
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
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
    """Return the optimizer's state tensors, without its step counts."""
    states = training.optimizer.state.values() if training.optimizer else ()
    return [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the address of each distinct storage to its bytes. A sparse tensor has a storage for each of its parts."""
    found = {}
    for tensor in tensors:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        found |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return found


def changes(profiler: profile) -> list[int]:
    """Return the bytes that each event of a profile allocates on the device (negative: frees), in order of time."""
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == device()
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peaks(starts: Mapping[Hashable, Start], setting: Setting) -> dict[Hashable, int]:
    """Measure `peak_bytes` of each start, each in its own process."""
    # Each process is forked from a server that has only imported this module.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        running = {name: pool.submit(peak_bytes, start, setting) for name, start in starts.items()}
        return {name: peak.result() for name, peak in tqdm(running.items(), "memory")}


def peak_bytes(start: Start, setting: Setting) -> int:
    """Return the peak memory of a step above the plain model: allocated on the GPU, or else resident (Linux).

    Args:
        start: turns a plain model into an object with a `step`; picklable.
    """
    # A small step first, so that code loaded on first use is not measured.
    small = Setting(tiny(2), setting.dtype, 1, 8, base=setting.base)
    start(small.build(), small).step(small.tokens())
    model, tokens = setting.build(), setting.tokens()
    release()
    plain = torch.cuda.memory_allocated() if device() == "cuda" else resident("VmRSS")
    started = start(model, setting)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        started.step(tokens)
        return torch.cuda.max_memory_allocated() - plain
    reset_peak()
    started.step(tokens)
    return resident("VmHWM") - plain
