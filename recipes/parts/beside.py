"""A method of PEFT beside SMT: the same base, records, order, steps and number of trained parameters."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel, Trainer

from recipes.parts.evaluation import Evaluation
from recipes.parts.methods import Adapter
from smt_trainer import SMTTrainer


@dataclass(frozen=True)
class Beside:
    """The result of the other method.

    Attributes:
        method: its name.
        rate: its learning rate.
        trained: number of its trained parameters.
        result: its evaluation, by likelihood alone.
    """

    method: str
    rate: float
    trained: int
    result: Evaluation


def train_beside(method: str, rate: float, trainer: SMTTrainer, model: PreTrainedModel) -> Trainer:
    """Train a method as `trainer` has trained, on the same kinds of modules.

    Args:
        method: one of `recipes.parts.adapters.ADAPTERS`.
        rate: its learning rate.
        trainer: a trainer that is done.
        model: its base, loaded anew.
    """
    adapter = Adapter(method, method, trainer.smt_config.target_modules)
    rival = adapter.trainer(
        model,
        trainer.smt_selection.fraction_of_model,
        trainer.args.seed,
        {},
        args=replace(trainer.args, learning_rate=rate, save_strategy="no", resume_from_checkpoint=None),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
    )
    rival.train()
    return rival
