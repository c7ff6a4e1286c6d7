"""Train a PEFT method to compare SMT with: same base, records, order, steps and number of trained parameters."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel, Trainer

from recipes.parts.evaluation import Evaluation
from recipes.parts.methods import Adapter
from smt_trainer import SMTTrainer


@dataclass(frozen=True)
class Beside:
    """The result of the PEFT method.

    Attributes:
        method: name of the method.
        rate: its learning rate.
        trained: number of its trained parameters.
        result: its evaluation, without generated answers.
    """

    method: str
    rate: float
    trained: int
    result: Evaluation


def train_beside(method: str, rate: float, trainer: SMTTrainer, model: PreTrainedModel) -> Trainer:
    """Train a PEFT method with the arguments, data and target modules of a finished SMT run.

    Args:
        method: one of `recipes.parts.adapters.ADAPTERS`.
        rate: its learning rate.
        trainer: the trainer of the finished run.
        model: the base of that run, freshly loaded.
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
