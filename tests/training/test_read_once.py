"""Data that can be read only once are refused when the trainer is made, other streams are not."""

import random

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import IterableDataset

from smt_trainer import SMTError
from smt_trainer.training.read_once import refuse_data_read_once


class Stream(IterableDataset):
    """Reads `make(self)` anew each time."""

    def __init__(self, make, items=()) -> None:
        self.make, self.rest, self.reads = make, iter(items), 0

    def __iter__(self):
        self.reads += 1
        yield from self.make(self)


ITEMS = tiny.examples(40)
ONCE = {
    "a generator over an iterator": lambda self: self.rest,
    "a generator over a queue": lambda self: iter(lambda: next(self.rest), None),
    "nothing the second time": lambda self: ITEMS if self.reads == 1 else [],
    "other values of one key": lambda self: [{**ITEMS[0], "weight": float(self.reads)}],
}


@pytest.mark.parametrize("make", ONCE.values(), ids=ONCE)
def test_data_that_do_not_start_again_are_refused(make, tmp_path):
    with pytest.raises(SMTError, match=r"can be read only once.*Two examples were taken.*selection"):
        tiny.smt_trainer(tiny.llama(), tmp_path, data=Stream(make, ITEMS))


def shuffled(self):
    yield from random.sample(ITEMS, len(ITEMS))


AGAIN = {
    "the same": lambda self: ITEMS,
    "shuffled": shuffled,
    "numbers drawn": lambda self: [{**ITEMS[0], "noise": torch.rand(3), "more": np.random.rand()}],
    "not a number": lambda self: [{**ITEMS[0], "a": float("nan"), "b": torch.tensor([1.0, torch.nan]), "c": [np.nan]}],
    "objects": lambda self: [{**ITEMS[0], "object": object()}],
    "empty": lambda self: [],
}


@pytest.mark.parametrize("make", AGAIN.values(), ids=AGAIN)
def test_data_that_start_again_are_accepted_and_the_random_state_is_kept(make):
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    refuse_data_read_once(Stream(make, ITEMS))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_another_image_is_another_example():
    image = pytest.importorskip("PIL.Image")
    refuse_data_read_once(Stream(lambda self: [{"image": image.new("L", (2, 2), 1)}]))
    with pytest.raises(SMTError, match="another example"):
        refuse_data_read_once(Stream(lambda self: [{"image": image.new("L", (2, 2), self.reads)}]))


def test_the_streams_of_datasets_are_not_read():
    def fail():
        raise AssertionError("read")
        yield

    refuse_data_read_once(datasets.IterableDataset.from_generator(fail))


@pytest.mark.parametrize("fields", [{"score": "magnitude"}, {"selection": None}, {"trained": True}], ids=str)
def test_without_a_warm_up_the_data_are_not_read(fields, tmp_path):
    model, stream = tiny.llama(), Stream(ONCE["a generator over an iterator"], ITEMS)
    smt_config = tiny.config()
    if "trained" in fields:
        tiny.smt_trainer(model, tmp_path).train()
    elif "selection" in fields:
        smt_config = tiny.config(selection=tiny.choose(model))
    else:
        smt_config = tiny.config(**fields)
    trainer = tiny.smt_trainer(model, tmp_path, smt_config, data=stream)
    assert stream.reads == 0
    trainer.train()
    assert torch.equal(trainer.inputs[0], torch.stack([item["input_ids"] for item in ITEMS[:4]]))
