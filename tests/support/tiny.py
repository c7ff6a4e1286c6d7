"""Models, data and arguments small enough for tests, made without downloads from a configuration and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from smt_trainer import BlockSelection, SMTCallback, SMTConfig, SMTTrainer
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.selection.choose import select_blocks
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.write_back import write_back
from smt_trainer.training.warmup import Warmup

VOCABULARY = 64
LENGTH = 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(architecture: str, seed: int = 0, **overrides) -> nn.Module:
    """Build a model of a transformers class ("LlamaForCausalLM") from a seed; leave the random state alone."""
    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(model_class.config_class(**SIZES | overrides)).eval()


def llama(seed: int = 0, **overrides) -> nn.Module:
    """Build two layers with grouped queries (q 64x64, k and v 32x64) and an MLP of 96x64 and 64x96."""
    return build("LlamaForCausalLM", seed, num_key_value_heads=2, **overrides)


def gpt2(seed: int = 0, **overrides) -> nn.Module:
    """Build two layers of `Conv1D`s, which store weights transposed: c_attn 192x64 is a parameter of 64x192."""
    return build("GPT2LMHeadModel", seed, **overrides)


def albert(seed: int = 0, **overrides) -> nn.Module:
    """Build a classifier that runs the same layer three times."""
    return build("AlbertForSequenceClassification", seed, num_hidden_layers=3, num_labels=3, **overrides)


def tokens(count: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Make token ids [count, length] that can be learnt: each sequence counts up from its first token."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, VOCABULARY, (count, 1), generator=generator)
    return 3 + (starts + torch.arange(length)) % (VOCABULARY - 3)


def examples(count: int = 32, length: int = LENGTH, seed: int = 1) -> list[dict[str, Tensor]]:
    """Make a data set of sequences of equal length, for causal language models."""
    return [{"input_ids": row, "labels": row} for row in tokens(count, length, seed)]


def ragged_examples(count: int = 32) -> list[dict[str, Tensor]]:
    """Make a data set of sequences of different lengths; `pad` collates it."""
    return [{"input_ids": row[: 3 + 5 * i % 8], "labels": row[: 3 + 5 * i % 8]} for i, row in enumerate(tokens(count))]


def pad(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate sequences of different lengths; padding carries no label."""
    padded = {
        key: nn.utils.rnn.pad_sequence([feature[key] for feature in features], True, value)
        for key, value in {"input_ids": 0, "labels": -100}.items()
    }
    return padded | {"attention_mask": (padded["labels"] != -100).long()}


class Stream(IterableDataset):
    """A data set without a length, which can be read many times, or only once if `once`."""

    def __init__(self, items: list, once: bool = False) -> None:
        self.items = iter(items) if once else items
        self.once = once

    def __iter__(self) -> Iterator:
        return self.items if self.once else iter(self.items)


def arguments(folder: str | Path, **overrides) -> transformers.TrainingArguments:
    """Make arguments of a short, silent run on the CPU."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(str(folder), **defaults | overrides)


def config(**overrides) -> SMTConfig:
    """Make a configuration that suits the sizes here: 12 of `llama`'s 64 blocks, after two warm-up steps."""
    return SMTConfig(**{"block_size": 16, "budget": 12, "smt_warmup_steps": 2} | overrides)


class Recording:
    """Trainer mixin that records inputs, random state and loss of each micro-step of the main loop."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.inputs, self.random_states, self.losses = [], [], []

    def compute_loss(self, model, inputs, *args, **kwargs):
        state = torch.get_rng_state()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and not getattr(self, "is_in_warmup", False):
            self.inputs.append(inputs["input_ids"])
            self.random_states.append(state)
            self.losses.append(loss.item())
        return loss


class RecordingTrainer(Recording, transformers.Trainer):
    """Transformers' Trainer, recording."""


class RecordingSMTTrainer(Recording, SMTTrainer):
    """`SMTTrainer`, recording."""


def smt_trainer(
    model: nn.Module,
    folder: str | Path,
    smt_config: SMTConfig | None = None,
    kind: type[SMTTrainer] = RecordingSMTTrainer,
    data=None,
    collator=None,
    callbacks=None,
    **overrides,
) -> SMTTrainer:
    """Make an `SMTTrainer`, or another `kind`, on `examples()`; `overrides` are training arguments."""
    return kind(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=examples() if data is None else data,
        data_collator=collator,
        callbacks=callbacks,
        smt_config=smt_config or config(),
    )


def stock_trainer(model: nn.Module, folder: str | Path, data=None, collator=None, **overrides) -> RecordingTrainer:
    """Make the stock trainer on the same data with the same arguments."""
    return RecordingTrainer(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=examples() if data is None else data,
        data_collator=collator,
    )


def warm_up(trainer: SMTTrainer) -> dict[str, Tensor]:
    """Run only the warm-up of a trainer, and return its scores."""
    return Warmup(trainer, find_candidates(trainer.model, trainer.smt_config).grids).run()


def logged(trainer: transformers.Trainer, key: str) -> list:
    """Return the values of one key in the trainer's log, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def choose(model: nn.Module, smt_config: SMTConfig | None = None, seed: int = 0) -> BlockSelection:
    """Select random blocks, without a warm-up."""
    smt_config = smt_config or config(score="random")
    targets = find_targets(model, smt_config)
    grids = target_grids(targets, smt_config)
    scores = make_scorer(targets, grids, smt_config, seed).scores()
    return select_blocks(scores, grids, smt_config, count_parameters(model))


def every_block(model: nn.Module, modules: list[str], block: int = 16, **config_fields) -> BlockSelection:
    """Select all blocks of the named linears."""
    grids = target_grids({name: model.get_submodule(name) for name in modules}, config(block_size=block))
    block_indices = {name: torch.cartesian_prod(*map(torch.arange, grid.shape)) for name, grid in grids.items()}
    return BlockSelection(grids, block_indices, count_parameters(model), config(**config_fields))


def batch(count: int = 4, **kwargs) -> dict[str, Tensor]:
    """Make one batch for a forward pass with a loss."""
    rows = tokens(count, **kwargs)
    return {"input_ids": rows, "labels": rows}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> Tensor:
    """Return the model's logits in evaluation mode."""
    return model.eval()(**inputs or {"input_ids": tokens(3)}).logits


def step(model, optimizer_class=torch.optim.SGD, **inputs) -> None:
    """Take one optimizer step and write it back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trained, lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    write_back(layer for _, layer in block_modules(model))


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Randomly change all that a rewritten model trains, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn_like(parameter) / 8
    write_back(linear for _, linear in block_modules(model))


def saved_files(folder) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Return file name -> metadata and tensors, of every safetensors file in a folder."""
    read = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            read[path.name] = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return read


def all_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, by name."""
    return {key: tensor for _, shard in saved_files(folder).values() for key, tensor in shard.items()}


def assert_same(ours, theirs) -> None:
    """Assert equality, bit for bit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Noting(SMTCallback):
    """Records the events in order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_warmup_begin(self, args, num_steps):
        self.events.append(f"begin {num_steps}")
        super().on_warmup_begin(args, num_steps)

    def on_warmup_step(self, args, step, loss):
        self.events.append(f"step {step}")
        super().on_warmup_step(args, step, loss)

    def on_warmup_end(self, args):
        self.events.append("end")
        super().on_warmup_end(args)

    def on_selection(self, args, selection):
        self.events.append(f"selection of {selection.num_blocks}")
        super().on_selection(args, selection)

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train")
        super().on_train_begin(args, state, control, **kwargs)
