"""Every field of `TrainingArguments`: check the table in `training_arguments.md` and its claims.

SMTTrainer selects every block of the value projections after a gradient warm-up; the stock trainer trains only these
weights. Everything observable of the two runs must then agree, whatever the arguments.
"""

import copy
import dataclasses
import functools
import gc
import importlib.machinery
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import types
import weakref
from concurrent.futures import Future
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import training_script
import transformers
from accelerate.state import AcceleratorState
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from smt_trainer import SMTCallback
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST_FILE
from smt_trainer.training.gradients import ExpectGradients
from smt_trainer.training.optimizers import REFUSED_OPTIMIZERS
from smt_trainer.training.trainer import SCORES_FILE, SELECTION_FILE
from smt_trainer.training.weight_readers import RefuseWeightReaders
from smt_trainer.training.write_back import ChangesWriteBack

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("training_arguments.md")
V_PROJ = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
KNOWN = {field.name for field in dataclasses.fields(TrainingArguments)}
NEWEST = Version(re.search(r"transformers (\d+\.\d+\.\d+)", TABLE.read_text())[1])
HERE = Version(transformers.__version__)


# ---- two trainers that must agree, and what is compared ----


class Watching:
    """Mixin for a recording trainer that also records what the warm-up and evaluation see."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.evaluated = []
        # Not a plain list, which the warm-up would restore when it ends.
        self.warm_up = types.SimpleNamespace(inputs=[])

    def compute_loss(self, model, inputs, *args, **kwargs):
        if getattr(self, "is_in_warmup", False):
            self.warm_up.inputs.append(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        self.evaluated.append((inputs["input_ids"], prediction_loss_only))
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)


class Ours(Watching, tiny.RecordingSMTTrainer):
    """Trains every block of the value projections."""


class Stock(Watching, tiny.RecordingTrainer):
    """Trains the value projections."""


class Metrics:
    """A `compute_metrics` that records its input; its score first falls, then rises."""

    def __init__(self) -> None:
        self.given = []

    def __call__(self, prediction, compute_result: bool = True) -> dict:
        parts = (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
        self.given.append([described(part) for part in parts])
        return {"score": (len(self.given) - 3) ** 2}


def described(part):
    """Return the nesting, shapes and sums of arrays."""
    if part is None or isinstance(part, (list, tuple)):
        return part and [described(each) for each in part]
    return [list(part.shape), torch.as_tensor(part).double().abs().sum().item()]


@functools.cache
def base_model(dtype: str) -> nn.Module:
    """Make the model from which all runs start."""
    return tiny.llama(attention_dropout=0.3).to(getattr(torch, dtype))


def make(kind, folder, data=tiny.examples, collator=None, metrics=False, callbacks=None, dtype="float64", **fields):
    """Make a trainer of a kind."""
    model = copy.deepcopy(base_model(dtype))
    given = {}
    if issubclass(kind, Ours):
        given = {
            "smt_config": tiny.config(target_modules=["v_proj"], budget=16, smt_warmup_steps=3, master_dtype=dtype)
        }
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in V_PROJ)
    return kind(
        model=model,
        args=tiny.arguments(folder, **copy.deepcopy(fields)),
        train_dataset=data(),
        eval_dataset=data() if collator else tiny.examples(6, seed=2),
        data_collator=collator and collator(),
        compute_metrics=Metrics() if metrics else None,
        callbacks=callbacks and callbacks(),
        **given,
    )


def trained(kind, folder, **case):
    """Make a trainer of a kind and train."""
    trainer = make(kind, folder, **case)
    trainer.train()
    return trainer


def record(trainer) -> dict:
    """Evaluate a trained trainer; return everything observable of it."""
    loader = trainer.callback_handler.train_dataloader
    weights = trainer.model.state_dict()
    shown = {
        "inputs": trainer.inputs,
        "random states": trainer.random_states,
        "losses": trainer.losses,
        "weights": [weights[f"{name}.weight"].clone() for name in V_PROJ],
        "log": [public(entry) for entry in trainer.state.log_history],
        "optimizer": {name: value for name, value in trainer.optimizer.param_groups[0].items() if name != "params"},
        "loader": {name: getattr(loader, name, None) for name in LOADER} | {"class": type(loader).__name__},
        "workers": type(loader.multiprocessing_context).__name__,
        "callbacks": sorted(
            type(each).__name__
            for each in trainer.callback_handler.callbacks
            if not isinstance(each, (SMTCallback, ExpectGradients, RefuseWeightReaders, ChangesWriteBack))
        ),
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "tokens": trainer.state.num_input_tokens_seen,
        "progress": [trainer.state.global_step, trainer.state.epoch],
        "files": files(trainer.args.output_dir),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cache": trainer.model.config.use_cache,
        "accumulation": trainer.accelerator.gradient_state.plugin_kwargs,
        "gathering": getattr(trainer.gather_function, "keywords", None),
    }
    torch.manual_seed(0)  # transformers before 5.23 may shuffle for evaluation
    shown["evaluation"] = public(trainer.evaluate())
    shown["evaluated in"] = str(trainer.model.dtype)
    shown["evaluated"] = trainer.evaluated
    shown["metrics given"] = getattr(trainer.compute_metrics, "given", None)
    return shown


LOADER = """
batch_size num_workers prefetch_factor pin_memory persistent_workers drop_last in_order _non_blocking
""".split()
OF_THE_MACHINE = re.compile(r"runtime|per_second|_mem_|preparation_time|total_flos")


def public(log: dict) -> dict:
    """Hide the values of a log entry that differ from run to run, and the results of the warm-up."""
    shared = {key: value for key, value in log.items() if not key.startswith("smt_")}
    return {key: None if OF_THE_MACHINE.search(key) else value for key, value in shared.items()}


def files(folder) -> list[str]:
    """Return the names of the files in an output folder; a delta and a whole model get the same name."""
    names = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
    names = [name.replace(DELTA_FILE, "the model").replace("model.safetensors", "the model") for name in names]
    return sorted(
        name for name in names if Path(name).name not in (SCORES_FILE, SELECTION_FILE, MANIFEST_FILE, *STOCK_CONFIGS)
    )


STOCK_CONFIGS = ("config.json", "generation_config.json")


def leaves(value, path: str = ""):
    """Yield the nested items of a record with their paths."""
    nested = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in nested:
        yield from leaves(item, f"{path}/{key}")
    if not isinstance(value, dict | list | tuple):
        yield path, value


def same(ours, stock) -> bool:
    """Compare two values; floats up to the rounding of different matrix products and of a float32 loss."""
    if torch.is_tensor(ours) and torch.is_tensor(stock):
        tolerances = {"rtol": 1e-5, "atol": 1e-9, "equal_nan": True} if ours.is_floating_point() else {}
        return ours.shape == stock.shape and (
            torch.allclose(ours, stock, **tolerances) if tolerances else ours.equal(stock)
        )
    if isinstance(ours, float) and isinstance(stock, float):
        return math.isclose(ours, stock, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(ours) and math.isnan(stock))
    return type(ours) is type(stock) and ours == stock


def differences(ours: dict, stock: dict) -> dict:
    """Return path -> both values, for each path where two records differ."""
    ours, stock = dict(leaves(ours)), dict(leaves(stock))
    both = {path: (ours.get(path, "missing"), stock.get(path, "missing")) for path in ours | stock}
    return {path: pair for path, pair in both.items() if not same(*pair)}


@pytest.fixture(autouse=True)
def global_state():
    """Restore the global state that a trainer changes."""
    verbosity, deterministic = transformers.utils.logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- arguments that work as they do on the stock trainer ----


def ragged():
    return tiny.ragged_examples(16)


def padded():
    return tiny.pad


def ragged_with_lengths():
    """Make sequences of different lengths; their column `size` reverses the order of length."""
    return datasets.Dataset.from_list([item | {"size": 99 - len(item["labels"])} for item in ragged()]).with_format(
        "torch"
    )


def one_unlabelled():
    """Make data whose third batch, in order, has no labels and so no loss."""
    items = tiny.examples()
    return items[:8] + [item | {"labels": torch.full_like(item["labels"], -100)} for item in items[8:12]] + items[12:]


def shifted():
    """Return a collator that needs a column which forward does not accept."""

    def collate(features):
        rows = torch.stack([(feature["input_ids"] + feature.get("shift", 0)) % tiny.VOCABULARY for feature in features])
        return {"input_ids": rows, "labels": rows}

    return collate


def with_shifts():
    return [item | {"shift": 5} for item in tiny.examples()]


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}
SAVING = {"save_strategy": "steps", "save_steps": 1}
WORKER = {"dataloader_num_workers": 1}
BEST = EVALUATING | SAVING | {"metrics": True, "load_best_model_at_end": True, "metric_for_best_model": "score"}
SIZED = {
    "data": ragged_with_lengths,
    "collator": padded,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,
}
# Each argument (or two that only work together), and other settings that make its effect visible.
CASES = [
    ({"per_device_train_batch_size": 2}, {}),
    ({"num_train_epochs": 1.5}, {"max_steps": -1, "data": lambda: tiny.examples(8)}),
    ({"max_steps": 3}, {}),
    ({"learning_rate": 5e-3}, {}),
    ({"warmup_steps": 2}, {}),
    ({"warmup_steps": 0.5}, {}),
    ({"optim_args": "momentum=0.5"}, {"optim": "sgd"}),
    ({"weight_decay": 0.5}, {}),
    ({"adam_beta1": 0.5}, {}),
    ({"adam_beta2": 0.5}, {}),
    ({"adam_epsilon": 1e-2}, {}),
    ({"gradient_accumulation_steps": 2}, {}),
    ({"skip_memory_metrics": False}, {}),
    ({"max_grad_norm": 1e-3}, {}),
    ({"label_smoothing_factor": 0.1}, {}),
    ({"bf16_full_eval": True}, {}),
    ({"fp16_full_eval": True}, {}),
    ({"use_cache": True}, {}),
    ({"neftune_noise_alpha": 5.0}, {}),
    ({"logging_strategy": "no"}, {}),
    ({"logging_strategy": "epoch"}, {}),
    ({"logging_steps": 2}, {}),
    ({"logging_first_step": True}, {"logging_steps": 3}),
    ({"logging_nan_inf_filter": False}, {"train_sampling_strategy": "sequential", "data": one_unlabelled}),
    ({"include_num_input_tokens_seen": "all"}, {"data": ragged, "collator": padded}),
    ({"include_num_input_tokens_seen": "non_padding"}, {"data": ragged, "collator": padded}),
    ({"log_level": "error"}, {}),
    ({"disable_tqdm": False}, {}),
    ({"eval_strategy": "epoch"}, {"data": lambda: tiny.examples(8)}),
    ({"eval_strategy": "steps", "eval_steps": 2}, {}),
    ({"eval_delay": 3}, EVALUATING),
    ({"per_device_eval_batch_size": 2}, {}),
    ({"prediction_loss_only": True}, {"metrics": True}),
    ({"eval_on_start": True}, EVALUATING),
    ({"eval_do_concat_batches": False}, {"metrics": True, "per_device_eval_batch_size": 2}),
    ({"eval_use_gather_object": True}, {"metrics": True}),
    ({"include_for_metrics": ["inputs", "loss"]}, {"metrics": True}),
    ({"batch_eval_metrics": True}, {"metrics": True, "per_device_eval_batch_size": 2}),
    ({"label_names": ["labels", "attention_mask"]}, {"metrics": True, "data": ragged, "collator": padded}),
    ({"save_strategy": "epoch"}, {"data": lambda: tiny.examples(8)}),
    ({"save_strategy": "best"}, BEST),
    ({"save_strategy": "steps", "save_steps": 2}, {}),
    ({"save_only_model": True}, SAVING),
    ({"save_total_limit": 1}, SAVING),
    ({"load_best_model_at_end": True, "metric_for_best_model": "score"}, EVALUATING | SAVING | {"metrics": True}),
    ({"metric_for_best_model": "loss"}, BEST | {"greater_is_better": False}),
    ({"greater_is_better": False}, BEST),
    ({"seed": 7}, {}),
    ({"data_seed": 7}, {}),
    ({"full_determinism": True}, {}),
    ({"accelerator_config": {"use_seedable_sampler": False}}, {}),
    ({"accelerator_config": {"non_blocking": True}}, {}),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, {}),
    ({"use_cpu": False}, {}),
    ({"dataloader_pin_memory": False}, {"use_cpu": False}),
    ({"dataloader_drop_last": True}, {"data": lambda: tiny.examples(6)}),
    ({"dataloader_num_workers": 1}, {}),
    ({"dataloader_persistent_workers": True}, WORKER),
    ({"dataloader_prefetch_factor": 3}, WORKER),
    ({"dataloader_multiprocessing_context": "fork"}, WORKER),
    ({"dataloader_in_order": False}, WORKER),
    ({"remove_unused_columns": False}, {"data": with_shifts, "collator": shifted}),
    ({"train_sampling_strategy": "sequential"}, {}),
    ({"train_sampling_strategy": "group_by_length"}, {"data": ragged, "collator": padded}),
    ({"train_sampling_strategy": "batch_rebalance"}, {"data": ragged, "collator": padded}),
    ({"length_column_name": "size"}, SIZED),
]
SCHEDULES = {
    "polynomial": {"power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 1.0},
    "greedy": {"patience": 0},
}
for name in (schedule.value for schedule in SchedulerType if schedule != SchedulerType.LINEAR):
    chosen = {"lr_scheduler_type": name}
    if name in SCHEDULES:
        chosen["lr_scheduler_kwargs"] = SCHEDULES[name]
    CASES.append((chosen, {"warmup_steps": 1} | (EVALUATING if name in ("reduce_lr_on_plateau", "greedy") else {})))


def is_known(fields: dict) -> bool:
    """Return whether this release of transformers has the fields and the sampling strategy."""
    return fields.keys() <= KNOWN and (HERE >= NEWEST or fields.get("train_sampling_strategy") != "batch_rebalance")


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Return a function that returns the stock trainer's record without the tested argument, made once per setting."""
    known = {}

    def baseline(beside: dict) -> dict:
        key = repr(beside)
        if key not in known:
            known[key] = record(trained(Stock, tmp_path_factory.mktemp("baseline"), **beside))
        return known[key]

    return baseline


@pytest.mark.parametrize(("fields", "beside"), CASES, ids=[str(fields) for fields, _ in CASES])
def test_an_argument_does_what_it_does_on_the_stock_trainer(fields, beside, baselines, tmp_path):
    if not is_known(fields):
        pytest.skip(f"not known to transformers {HERE}")
    case = beside | fields
    trainers = [trained(kind, tmp_path / kind.__name__, **case) for kind in (Ours, Stock)]
    seen, seen_first = trainers[0].inputs, trainers[0].warm_up.inputs
    ours, stock = map(record, trainers)
    assert differences(ours, stock) == {}
    assert len(seen_first) > 0 and all(map(torch.equal, seen_first, seen))
    assert differences(stock, baselines(beside)), "the argument has no effect"


# ---- the warm-up under these arguments ----

WARM_UPS = {
    "nothing": {},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True, "dtype": "float32"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "group_by_length": {"train_sampling_strategy": "group_by_length", "data": ragged, "collator": padded},
    "data_seed": {"data_seed": 7},
}


@pytest.mark.parametrize("case", WARM_UPS.values(), ids=WARM_UPS)
def test_the_warm_up_computes_what_the_first_steps_compute(case, tmp_path):
    trainer = trained(Ours, tmp_path, learning_rate=0.0, max_steps=3, **case)
    assert tiny.logged(trainer, "smt_warmup_loss") == pytest.approx([sum(tiny.logged(trainer, "loss")) / 3], rel=1e-6)
    if case:
        usual = trained(Ours, tmp_path, learning_rate=0.0, max_steps=3, dtype=case.get("dtype", "float64"))
        assert tiny.logged(usual, "smt_warmup_loss") != tiny.logged(trainer, "smt_warmup_loss")


def test_the_warm_ups_workers_end_with_it(tmp_path):
    """This includes persistent workers."""

    class Counting(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.workers = len(multiprocessing.active_children())

    trainer = trained(
        Ours, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, callbacks=lambda: [Counting()]
    )
    (counting,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Counting))
    assert counting.workers == 0


def test_a_trainer_is_freed_with_its_last_reference(tmp_path):
    """If the garbage collector freed it, torch would wait five seconds for each persistent worker."""
    gone = []
    for kind in (Stock, Ours):
        trainer = trained(kind, tmp_path)
        reference = weakref.ref(trainer)
        del trainer
        gone.append(reference() is None)
    assert gone == [True, True]


# ---- arguments whose effect shows elsewhere ----


def calls(monkeypatch, owner, name) -> list:
    """Wrap a function so that each call adds its keyword arguments to the returned list."""
    made, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: made.append(kwargs) or function(*args, **kwargs))
    return made


def test_the_cache_is_emptied_in_the_same_steps_as_on_the_stock_trainer_and_in_the_warm_up(monkeypatch, tmp_path):
    counts = []
    for kind in (Stock, Ours):
        emptied = calls(monkeypatch, transformers.trainer, "clear_device_cache")
        trained(kind, tmp_path, torch_empty_cache_steps=2)
        counts.append(len(emptied))
    assert counts == [2, 2 + 3]


def test_predictions_leave_the_device_as_often_as_they_do_on_the_stock_trainer(monkeypatch, tmp_path):
    moved = calls(monkeypatch, transformers.trainer.EvalLoopContainer, "to_cpu_and_numpy")
    counts = []
    for kind in (Stock, Ours):
        trainer = make(kind, tmp_path, eval_accumulation_steps=1, per_device_eval_batch_size=2, metrics=True)
        trainer.evaluate()
        counts.append(len(moved))
    assert counts[1] == 2 * counts[0] >= 2 * 3


def test_the_model_is_compiled_with_the_options_of_the_stock_trainer(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: given.append(kwargs) or model)
    for kind in (Stock, Ours):
        trained(kind, tmp_path, torch_compile_mode="max-autotune", torch_compile_backend="aot_eager")
    assert given[0] == given[1] and given[0]["mode"] == "max-autotune" and given[0]["backend"] == "aot_eager"


CHECKPOINTED = {
    "all layers": {},
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "every other layer": {"every_n_layers": 2},
    # torch's default is the reentrant kind.
    "use_reentrant left out": {"preserve_rng_state": True},
}


@pytest.mark.skipif("activation_checkpointing" not in KNOWN, reason="this release calls it gradient_checkpointing")
@pytest.mark.parametrize("kwargs", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointed_layers_are_computed_as_often_as_on_the_stock_trainer(kwargs, tmp_path):
    computed, losses = [], []
    for kind in (Stock, Ours, Ours):
        trainer = make(
            kind, tmp_path, activation_checkpointing=len(losses) < 2, activation_checkpointing_kwargs=kwargs or None
        )
        passes = []
        for layer in trainer.model.model.layers:
            layer.self_attn.register_forward_hook(
                lambda *_, each=trainer, at=passes: None if getattr(each, "is_in_warmup", False) else at.append(1)
            )
        trainer.train()
        computed.append(len(passes))
        losses.append(trainer.losses)
    assert computed[0] == computed[1] > computed[2] == 4 * 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] == losses[2]


def test_an_overflow_is_found_in_the_blocks(capsys, tmp_path):
    class Breaking(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.get_submodule(V_PROJ[1]).blocks.data.fill_(float("inf"))

    with pytest.raises(ValueError, match="DebugUnderflowOverflow: inf/nan detected"):
        trained(Ours, tmp_path, debug="underflow_overflow", callbacks=lambda: [Breaking()])
    found = capsys.readouterr().out
    assert f"{V_PROJ[1]} SMTLinear" in found and "blocks has infs" in found


def terminate(trainer) -> None:
    """Send this process a SIGTERM, and wait until the trainer has noticed it."""
    (jit,) = (each for each in trainer.callback_handler.callbacks if type(each).__name__ == "JITCheckpointCallback")
    jit.jit_manager.kill_wait = 0
    os.kill(os.getpid(), signal.SIGTERM)
    while not jit.jit_manager.is_checkpoint_requested:
        time.sleep(0.01)


class Terminated:
    """Trainer mixin: the process is terminated in the warm-up, or in the step after `at` others."""

    at = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.at == ("the warm-up" if getattr(self, "is_in_warmup", False) else self.state.global_step):
            self.at = terminate(self)
        return loss


@pytest.mark.parametrize("steps", [0, 2], ids=["in the warm-up", "in the main loop"])
def test_a_terminated_run_saves_itself_and_resumes_as_on_the_stock_trainer(steps, tmp_path):
    handler, resumed = signal.getsignal(signal.SIGTERM), []
    for kind in (Ours, Stock):
        case = {"folder": tmp_path / kind.__name__, "gradient_accumulation_steps": 2, "max_steps": 5}
        trainer = make(type("", (Terminated, kind), {}), enable_jit_checkpoint=True, **case)
        if steps:
            trainer.at = steps
        elif kind is Ours:
            trainer.at = "the warm-up"
        else:
            terminate(trainer)
        trainer.train()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert [path.name for path in case["folder"].glob("checkpoint-*")] == [f"checkpoint-{steps}"]

        resumed.append(make(kind, **case))
        resumed[-1].train(resume_from_checkpoint=True)
    assert differences(*({"losses": trainer.losses, "log": tiny.logged(trainer, "loss")} for trainer in resumed)) == {}
    assert len(resumed[0].losses) == 2 * (5 - steps)


class Counting(TrainerCallback, ExportableState):
    """Counts steps, as part of the saved state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, *args, **kwargs):
        self.count += 1

    def state(self) -> dict:
        return {"args": {"count": self.count}, "attributes": {}}


RESUMED = [
    ({}, {}),
    ({"ignore_data_skip": True}, {}),
    ({"restore_callback_states_from_checkpoint": True}, {}),
    ({}, {"save_only_model": True}),
]


@pytest.mark.parametrize(("fields", "saved"), RESUMED, ids=map(str, RESUMED))
def test_a_resumed_run_equals_a_resumed_stock_run(fields, saved, tmp_path):
    common = {"callbacks": lambda: [Counting()], "data": lambda: tiny.examples(12), "max_steps": 8}
    records = []
    for kind, given in ((Stock, fields), (Ours, fields), (Stock, {})):
        folder = tmp_path / str(len(records))
        trained(kind, folder, save_strategy="steps", save_steps=5, **common, **saved)
        trainer = make(kind, folder, **common, **given)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        (counting,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Counting))
        records.append(record(trainer) | {"counted": counting.count})
    assert differences(records[1], records[0]) == {}
    assert bool(differences(records[0], records[2])) is bool(fields)
    assert len(records[1]["inputs"]) == 3


# ---- optimizers ----

# Values of a row or column share their state, and blocks have other rows and columns than the weight.
NOT_ELEMENTWISE = ("adafactor",)


def outcome(kind, folder, optim):
    """Train with an optimizer; return the losses, or the error with its message."""
    learning_rate = {"sgd": 1.0, "adafactor": 1e-2}.get(optim, 1e-3)
    try:
        trainer = trained(kind, folder, optim=optim, learning_rate=learning_rate, dtype="float32")
    except (ImportError, ValueError) as error:
        return type(error), str(error)
    assert trainer.losses[-1] < trainer.losses[0]
    return trainer.losses


@pytest.mark.parametrize(
    "optim", [name.value for name in OptimizerNames if not name.value.startswith(REFUSED_OPTIMIZERS)]
)
def test_an_optimizer_trains_or_fails_as_on_the_stock_trainer(optim, tmp_path):
    ours, stock = (outcome(kind, tmp_path, optim) for kind in (Ours, Stock))
    if optim in NOT_ELEMENTWISE:
        assert ours[0] == stock[0]
    elif isinstance(stock, list):
        assert ours == pytest.approx(stock, rel=1e-5)
    else:
        assert ours == stock


# ---- reports ----


@pytest.fixture
def reports(monkeypatch):
    """Mock trackio; return a list of the calls to it."""
    told = []
    module = types.ModuleType("trackio")
    module.__spec__, module.__version__ = importlib.machinery.ModuleSpec("trackio", None), "1.0.0"
    for name in ("init", "log", "finish", "freeze", "sync"):
        setattr(module, name, lambda *args, name=name, **kwargs: told.append((name, args, kwargs)))
    module.config = type("Config", (dict,), {"update": lambda self, *args, **kwargs: None})()
    space = types.SimpleNamespace(get=lambda: "me/space")
    module.context_vars = types.SimpleNamespace(current_space_id=space, current_project=space)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return told


REPORTED = {
    "run_name": "first try",
    "project": "tiny",
    "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/static",
}


def test_a_reporter_gets_the_same_as_from_the_stock_trainer(reports, tmp_path):
    told = []
    for kind in (Stock, Ours):
        trained(kind, tmp_path, report_to="trackio", **{name: REPORTED[name] for name in REPORTED if name in KNOWN})
        told.append(
            [(name, [[key for key in sorted(part) if "smt_" not in key] for part in args], kwargs)
             for name, args, kwargs in reports]
        )  # fmt: skip
        warm_ups = [call for call in reports if any("smt_blocks" in key for part in call[1] for key in part)]
        reports.clear()
    stock, ours = told
    assert ours == stock
    assert len(warm_ups) == 1
    given = str(stock)
    assert all(REPORTED[name] in given for name in REPORTED if name in KNOWN)


# ---- the hub ----


class Upload(Future):
    """An upload that is never done until it is awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.set_result(None)

    def done(self) -> bool:
        return False


@pytest.fixture
def hub(monkeypatch):
    """Mock the hub; return a list of the calls to it."""
    made = []

    def create_repo(name, **kwargs):
        made.append(("create_repo", name, kwargs))
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(folder_path, **kwargs):
        kept = [name for name in files(folder_path) if not name.startswith("checkpoint-") and name != "README.md"]
        made.append(("upload_folder", kept, kwargs))
        return Upload()

    if hasattr(transformers.trainer, "hf_api"):
        api = types.SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    else:  # transformers before 5.23 calls the functions directly
        monkeypatch.setattr(transformers.trainer, "create_repo", create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder)
    return made


HUB = [
    {},
    {"hub_model_id": "me/tiny"},
    {"hub_token": "secret"},
    {"hub_private_repo": True},
    {"hub_revision": "second"},
    {"hub_always_push": True},
    {"hub_strategy": "end"},
    {"hub_strategy": "checkpoint", "hub_always_push": True},
    {"hub_strategy": "all_checkpoints", "hub_always_push": True},
]


@pytest.mark.parametrize("fields", HUB, ids=map(str, HUB))
def test_the_hub_gets_the_same_calls_as_from_the_stock_trainer(fields, hub, tmp_path):
    made = []
    for kind, given in ((Stock, fields), (Ours, fields), (Stock, {})):
        trained(kind, tmp_path / str(len(made)) / "run", push_to_hub=True, save_strategy="steps", save_steps=2, **given)
        made.append([*hub])
        hub.clear()
    stock, ours, usual = made
    assert ours == stock
    assert stock[0][0] == "create_repo" and (stock == usual) is (not fields)


# ---- two nodes with one process each ----

SHORT = {"max_steps": 2}
RAGGED = {"data": ragged, "collator": padded}
ON_TWO_NODES = {
    "split_batches": ({"accelerator_config": {"split_batches": True}}, SHORT),
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, SHORT),
    "even_batches": (
        {"accelerator_config": {"even_batches": False}},
        {"data": lambda: tiny.examples(10), "max_steps": 1, "per_device_eval_batch_size": 3},
    ),
    "sync_each_batch": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        SHORT | {"gradient_accumulation_steps": 2},
    ),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, RAGGED),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, RAGGED),
    "graph": ({"ddp_find_unused_parameters": False, "ddp_static_graph": True}, SHORT),
    "buckets": ({"ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": False}, SHORT),
    "logs": ({"log_on_each_node": False, "log_level_replica": "info"}, SHORT | {"log_level": "error"}),
    "save_on_each_node": ({"save_on_each_node": True}, SHORT | {"save_strategy": "steps", "save_steps": 2}),
}


def on_a_node(folder: Path, environment: dict) -> None:
    """Perform all runs in one of the two processes, and write their records."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()
    usual, results = {}, {}
    noted = calls(pytest.MonkeyPatch(), nn.parallel.DistributedDataParallel, "__init__")

    def shown(kind, run, case):
        noted.clear()
        trainer = trained(kind, folder / run, **case)
        return record(trainer) | {"wrapped with": noted[0]}, trainer.warm_up.inputs, trainer.inputs

    for name, (fields, beside) in ON_TWO_NODES.items():
        if is_known(fields):
            run = f"rank-{os.environ['RANK']}/{name}"
            if repr(beside) not in usual:
                usual[repr(beside)] = shown(Stock, f"{run}-{len(usual)}", beside)
            pair = [shown(kind, f"{run}-{kind.__name__}", beside | fields) for kind in (Ours, Stock)]
            results[name] = *pair, usual[repr(beside)]
    (folder / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Run on two nodes; return the records of each."""
    folder = tmp_path_factory.mktemp("nodes")
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(training_script.free_port()),
    }
    processes = [
        training_script.FORKED.Process(target=on_a_node, args=(folder, environment | {"RANK": str(rank)}), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in ON_TWO_NODES if name != "save_on_each_node"])
def test_on_two_nodes_an_argument_does_what_it_does_on_the_stock_trainer(name, nodes):
    fields, _ = ON_TWO_NODES[name]
    if not is_known(fields):
        pytest.skip(f"not known to transformers {HERE}")
    wrapping = {field.removeprefix("ddp_"): value for field, value in fields.items() if field.startswith("ddp_")}
    for (ours, warm_up_inputs, inputs), (stock, _, _), _ in (node[name] for node in nodes):
        assert differences(ours, stock) == {}
        assert len(warm_up_inputs) > 0 and all(map(torch.equal, warm_up_inputs, inputs))
        assert {option: ours["wrapped with"].get(option, False) for option in wrapping} == wrapping
    assert any(differences(node[name][1][0], node[name][2][0]) for node in nodes), "the argument has no effect"


def test_each_node_saves_the_delta(nodes):
    """The stock trainer saves everything but the model."""
    for node in nodes:
        ours, stock = (set(shown["files"]) for shown, _, _ in node["save_on_each_node"][:2])
        assert ours == stock | {"checkpoint-2/the model"}


# ---- the table ----


def rows() -> list[tuple[list[str], str, str]]:
    """Return the fields, the status and the proof of each row."""
    cells = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", fields), status.strip(), shown) for fields, status, shown in cells]


@pytest.mark.skipif(HERE < NEWEST, reason=f"the table is for transformers {NEWEST}")
def test_the_table_has_each_field_once():
    assert sorted(field for fields, _, _ in rows() for field in fields) == sorted(KNOWN)


@pytest.mark.parametrize(("fields", "status", "shown"), rows(), ids=[row[0][0] for row in rows()])
def test_a_row_names_tests_that_exist_and_cover_its_fields(fields, status, shown):
    assert status in ("works", "works (GPU; not run yet)", "not applicable", "refused")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
    assert named or status not in ("works", "refused")
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text()
    cases = {
        "test_an_argument_does_what_it_does_on_the_stock_trainer": [case for case, _ in CASES],
        "test_on_two_nodes_an_argument_does_what_it_does_on_the_stock_trainer": [
            case for case, _ in ON_TWO_NODES.values()
        ],
        "test_the_hub_gets_the_same_calls_as_from_the_stock_trainer": [*HUB, {"push_to_hub": True}],
        "test_a_resumed_run_equals_a_resumed_stock_run": [case for case, _ in RESUMED],
        "test_a_reporter_gets_the_same_as_from_the_stock_trainer": [REPORTED | {"report_to": "trackio"}],
    }
    tested = set().union(*(case for _, test in named for case in cases.get(test, ())))
    assert not tested or tested.issuperset(fields)
