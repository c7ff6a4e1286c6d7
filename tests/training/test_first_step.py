"""In the warm-up the trainer is as at its first step, and afterwards as before."""

import collections
import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import WeightedRandomSampler
from transformers import TrainerCallback

from smt_trainer.training.preserved import plain_data_preserved

EPOCHS = {"max_steps": -1, "num_train_epochs": 3}


class Seeing(tiny.SMTTrainer):
    """Puts in `notes` what a loss can see of the run, apart in the warm-up and in the main loop."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        state = self.state
        entry = {
            "state": {**dataclasses.asdict(state), "log_history": None, "stateful_callbacks": None},
            "rate": self.lr_scheduler.get_last_lr(),
            "groups": [group["lr"] for group in self.optimizer.param_groups],
            "annealed": state.global_step / state.max_steps,
        }
        type(self).notes[not self.is_in_warmup].append(entry)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    "overrides",
    [{}, EPOCHS, {"warmup_steps": 2}, {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}],
    ids=str,
)
def test_every_warm_up_step_sees_what_the_first_step_sees(overrides, tmp_path):
    kind = type("Kind", (Seeing,), {"notes": ([], [])})
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, kind=kind, **overrides)
    trainer.train()
    warm_up, main_loop = kind.notes
    assert len(warm_up) >= 2 and all(entry == main_loop[0] for entry in warm_up)


@pytest.mark.parametrize("data", [None, tiny.Stream(tiny.examples())], ids=["with a length", "without"])
def test_selecting_alone_has_a_state_as_well(data, tmp_path):
    kind = type("Kind", (Seeing,), {"notes": ([], [])})
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, kind=kind, data=data, max_steps=4 if data is None else 1)
    trainer.args.max_steps = -1 if data is not None else 4
    state = trainer.state
    trainer.select()
    steps = 2 if data is not None else 4
    assert [entry["state"]["max_steps"] for entry in kind.notes[0]] == [steps, steps]
    assert trainer.optimizer is None and trainer.lr_scheduler is None and trainer.state is state


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Logging(tiny.RecordingSMTTrainer):
    def compute_loss(self, *args, **kwargs):
        self.log({"extra": 1.0})
        return super().compute_loss(*args, **kwargs)


def test_what_the_warm_up_logs_reaches_no_one(tmp_path):
    reporter = Reporter()
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, kind=Logging, callbacks=[reporter])
    trainer.train()
    assert len([logs for logs in reporter.logs if "extra" in logs]) == 4
    assert len(tiny.logged(trainer, "extra")) == 4
    assert [logs["step"] for logs in trainer.state.log_history if "extra" in logs] == [0, 1, 2, 3]


class Counting(tiny.RecordingSMTTrainer):
    """Counts in many ways, in itself, its state and its control."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self._ratio = 0, 0.5
        self.seen = self.outside = []
        self.by_name = collections.defaultdict(list)
        self.recent, self.kinds = collections.deque(maxlen=3), set()
        self.total, self.array = torch.zeros(2), [{"n": torch.zeros(1)}]

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.calls += 1
            self._ratio *= 0.5
            self.seen.append(self.calls)
            self.by_name["loss"].append(loss.item())
            self.recent.append(self.calls)
            self.kinds.add(self.calls)
            self.total += 1
            self.array[0]["n"] += 1
            self.lazily = getattr(self, "lazily", 0) + 1
            self.state.num_input_tokens_seen += inputs["input_ids"].numel()
            self.state.total_flos += 1
            self.control.should_log = self.control.should_log or self.is_in_warmup
        return loss

    def counts(self):
        names = ("calls", "_ratio", "seen", "recent", "kinds", "total", "array", "lazily")
        state = self.state.num_input_tokens_seen, dict(self.by_name)
        return [getattr(self, name, None) for name in names], state, self.control.should_log


def test_what_a_trainer_counts_is_as_without_a_warm_up(tmp_path):
    with_warm_up = tiny.smt_trainer(tiny.llama(), tmp_path, kind=Counting)
    shared, before = with_warm_up.seen, repr(with_warm_up.counts())
    with_warm_up.select()
    assert repr(with_warm_up.counts()) == before
    with_warm_up.train()
    assert with_warm_up.seen is with_warm_up.outside is shared
    selection = tiny.config(selection=with_warm_up.smt_selection)
    without = tiny.smt_trainer(tiny.llama(), tmp_path, selection, kind=Counting)
    without.train()
    assert repr(with_warm_up.counts()) == repr(without.counts())


def test_references_between_plain_data_survive():
    owner = type("Owner", (), {})()
    owner.by_name = {"losses": [1.0], "steps": collections.Counter(a=0)}
    owner.losses, owner.pair = owner.by_name["losses"], (torch.zeros(2), np.zeros(2))
    tensor, array = owner.pair
    with plain_data_preserved(owner):
        owner.losses.append(2.0)
        owner.by_name["steps"]["a"] -= 1
        owner.by_name["new"] = []
        tensor.add_(1)
        array += 1
        owner.pair = ()
    assert owner.by_name == {"losses": [1.0], "steps": {"a": 0}}
    assert owner.losses is owner.by_name["losses"]
    assert owner.pair == (tensor, array) and not tensor.any() and not array.any()


def test_plain_data_are_restored_and_everything_else_is_left_alone():
    owner = type("Owner", (), {})()
    data, model = [1, 2, 3], torch.nn.Linear(2, 2)
    owner.data, owner.model, owner.large, owner.mixed = data, model, torch.zeros(2**17), [object()]
    with pytest.raises(RuntimeError), plain_data_preserved(owner, apart=(data,)):
        owner.data.append(4)
        owner.large += 1
        owner.mixed.append(1)
        owner.tensor = torch.zeros(1, requires_grad=True)
        owner.number = 1
        raise RuntimeError
    assert owner.data == [1, 2, 3, 4] and owner.large[0] == 1 and len(owner.mixed) == 2
    assert owner.model is model and hasattr(owner, "tensor") and not hasattr(owner, "number")


# ---- the buffers of the model ----


class Normed(torch.nn.Module):
    """A language model with batch normalisation, a moving average that is assigned, and a cache."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.llama = tiny.llama()
        self.norm = torch.nn.BatchNorm1d(64)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, input_ids, labels=None):
        hidden = self.llama.model(input_ids=input_ids).last_hidden_state
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean()
        self.cache = torch.ones(2)
        logits = self.llama.lm_head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("score", ["grad_l1", "qm_taylor", "activation"])
def test_the_statistics_of_the_model_are_as_before(score, tmp_path):
    model = Normed()
    before, average = tiny.weights(model), model.average
    trainer = tiny.smt_trainer(model, tmp_path, tiny.config(score=score))
    trainer.select()
    tiny.assert_same(tiny.weights(model), before)
    assert model.average is average and model.cache.numel() == 2
    trainer.train()
    assert model.norm.num_batches_tracked == 4


def test_the_statistics_are_restored_after_an_exception(tmp_path):
    class Failing(tiny.SMTTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            raise RuntimeError("broken")

    model = Normed()
    before = tiny.weights(model)
    with pytest.raises(RuntimeError, match="broken"):
        tiny.smt_trainer(model, tmp_path, kind=Failing).train()
    tiny.assert_same(tiny.weights(model), before)


def test_statistics_follow_those_of_the_stock_trainer(tmp_path):
    runs = []
    for make in (tiny.stock_trainer, tiny.smt_trainer):
        model = Normed()
        make(model, tmp_path, learning_rate=0.0).train()
        runs.append({name: tensor for name, tensor in model.named_buffers() if "block_indices" not in name})
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor)


# ---- generators of their own ----


class Noisy:
    """A collator that masks tokens by a generator of its own, which it makes when it is first called."""

    def __init__(self, make):
        self.make, self.generator = make, None

    def __call__(self, features):
        self.generator = self.generator or self.make()
        batch = tiny.pad(features)
        is_torch = isinstance(self.generator, torch.Generator)
        drawn = torch.rand(1, generator=self.generator).item() if is_torch else self.generator.random()
        batch["labels"] = batch["labels"] if drawn < 0.5 else batch["labels"].roll(1, 1)
        return batch


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
        lambda: torch.Generator().manual_seed(3),
    ],
    ids=["numpy", "old numpy", "python", "torch"],
)
@pytest.mark.parametrize("is_made", [True, False])
def test_a_generator_of_the_collator_is_as_without_a_warm_up(make, is_made, tmp_path):
    losses = []
    for trainer in (tiny.smt_trainer, tiny.stock_trainer):
        collator = Noisy(make)
        if is_made:
            collator.generator = make()
        run = trainer(tiny.llama(), tmp_path / trainer.__name__, collator=collator, learning_rate=0.0, max_steps=8)
        run.train()
        losses.append(tiny.logged(run, "loss"))
    assert losses[0] == losses[1] and len(set(losses[0])) > 1


class Parts:
    """A collator that is made of parts, as transforms of images are."""

    def __init__(self, *parts):
        self.transform = SimpleNamespace(parts=list(parts))

    def __call__(self, features):
        return self.transform.parts[0](features)


def test_generators_within_a_collator_and_of_the_trainer_s_sampler_are_as_without_a_warm_up(tmp_path):
    losses = []
    for kind in (tiny.RecordingSMTTrainer, tiny.RecordingTrainer):

        class Sampling(kind):
            generator = None

            def _get_train_sampler(self, *args):
                self.generator = self.generator or torch.Generator().manual_seed(5)
                return WeightedRandomSampler(torch.ones(32), 32, generator=self.generator)

        fields = {"smt_config": tiny.config()} if kind is tiny.RecordingSMTTrainer else {}
        run = Sampling(
            model=tiny.llama(),
            args=tiny.arguments(tmp_path / kind.__name__, learning_rate=0.0, max_steps=8),
            train_dataset=tiny.examples(),
            data_collator=Parts(Noisy(lambda: random.Random(3))),
            **fields,
        )
        run.train()
        losses.append(tiny.logged(run, "loss"))
    assert losses[0] == losses[1] and len(set(losses[0])) > 1
