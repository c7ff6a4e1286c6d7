"""Classes of examples for `qm_taylor`, from labels or from a column that bypasses the trainer's collator."""

import datasets
import pytest
import tiny
import torch

from smt_trainer import SMTError
from smt_trainer.scores.classes import CLASSES_KEY, take_classes
from smt_trainer.training.class_column import ClassCollator


def labelled(count=32):
    """Make sequences whose subject depends on their first token."""
    return [item | {"subject": f"subject {item['input_ids'][0]}"} for item in tiny.examples(count)]


def strict(features):
    """A collator that refuses what the model does not take."""
    assert all(set(feature) == {"input_ids", "labels"} for feature in features)
    return {key: torch.stack([torch.as_tensor(feature[key]) for feature in features]) for key in features[0]}


def trainer_for(folder, data, column="subject", collator=strict, **overrides):
    smt_config = tiny.config(score="qm_taylor", class_column=column)
    return tiny.smt_trainer(tiny.llama(), folder, smt_config, data=data, collator=collator, **overrides)


DATA = {
    "list": labelled,
    "Dataset": lambda: datasets.Dataset.from_list(labelled()).with_format("torch"),
    "IterableDataset": lambda: tiny.Stream(labelled()),
}


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
@pytest.mark.parametrize("overrides", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}])
def test_a_column_names_the_classes_that_the_labels_name_by_default(make, overrides, tmp_path):
    by_column, by_label = (
        tiny.warm_up(trainer_for(tmp_path, make(), column, **overrides)) for column in ("subject", None)
    )
    assert all(torch.equal(by_column[name], by_label[name]) for name in by_label)


def test_fewer_classes_change_the_scores(tmp_path):
    halves = [item | {"subject": number % 2} for number, item in enumerate(tiny.examples())]
    by_half, by_label = (tiny.warm_up(trainer_for(tmp_path, halves, column)) for column in ("subject", None))
    assert any(not torch.allclose(by_half[name], by_label[name], rtol=0.01) for name in by_label)


def test_the_main_loop_sees_what_the_stock_trainers_sees(tmp_path):
    ours = trainer_for(tmp_path, labelled())
    stock = tiny.stock_trainer(tiny.llama(), tmp_path, data=labelled(), collator=strict)
    for trainer in (ours, stock):
        trainer.train()
    assert all(torch.equal(*pair) for pair in zip(ours.inputs, stock.inputs, strict=True))
    assert ours.losses[0] == stock.losses[0] and ours.data_collator is strict


@pytest.mark.parametrize("make", [DATA["list"], DATA["Dataset"]])
def test_a_missing_column_is_refused_before_any_work(make, tmp_path):
    with pytest.raises(SMTError, match="no column class_column='topic'; its columns are input_ids, labels, subject"):
        trainer_for(tmp_path, make(), "topic")


def test_a_column_that_a_stream_lacks_is_refused_at_its_first_batch(tmp_path):
    trainer = trainer_for(tmp_path, DATA["IterableDataset"](), "topic")
    with pytest.raises(SMTError, match="no column class_column='topic'; its columns are input_ids, labels"):
        trainer.train()


class OwnLoader(tiny.RecordingSMTTrainer):
    """Makes its own data loader, which collates."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset,
            4,
            collate_fn=lambda rows: strict([{key: row[key] for key in ("input_ids", "labels")} for row in rows]),
        )


def test_batches_that_lost_the_column_are_refused(tmp_path):
    smt_config = tiny.config(score="qm_taylor", class_column="subject")
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path, smt_config, OwnLoader, labelled())
    with pytest.raises(SMTError, match="come without class_column='subject'"):
        trainer.train()


def test_an_input_of_the_model_can_be_the_class(tmp_path):
    collate = ClassCollator(strict, "labels", is_input=True)
    batch = collate(tiny.examples(2))
    assert set(batch) == {"input_ids", "labels", CLASSES_KEY}


def test_a_number_is_the_same_class_in_every_type():
    values = [3, torch.tensor(3), torch.tensor(3).numpy(), "3", 4]
    features = [item | {"subject": value} for item, value in zip(tiny.examples(5), values, strict=True)]
    first, tensor, scalar, text, four = ClassCollator(strict, "subject", False)(features)[CLASSES_KEY].tolist()
    assert first == tensor == scalar and len({first, text, four}) == 3


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([[-100, 5, 6], [7, -100, 8], [-100, -100, -100]]), [5, 7, -100]),
    ],
)
def test_the_class_is_the_label_or_the_first_labelled_token(labels, classes):
    inputs = {"labels": labels}
    assert take_classes(inputs, None).tolist() == classes and inputs == {"labels": labels}


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 2, 2, dtype=torch.long), [1, 2], None])
def test_labels_that_name_no_class_are_refused(labels):
    with pytest.raises(SMTError, match="classes are read from integer labels"):
        take_classes({"labels": labels}, None)
