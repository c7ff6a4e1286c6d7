"""The ways to fine-tune that are compared: a record each. All are trained by transformers' Trainer."""

from dataclasses import dataclass, field

import peft
from torch import nn
from transformers import PreTrainedModel, Trainer

from recipes.parts.adapters import adapter_config
from recipes.parts.heads import new_modules
from smt_trainer import SMTConfig, SMTTrainer
from smt_trainer.model.targets import count_parameters, find_targets


def trained_parameters(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Full:
    """Full fine-tuning."""

    label: str

    def trainer(self, model: PreTrainedModel, budget: float | None, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer of all parameters."""
        return Trainer(model.requires_grad_(True), **arguments)


@dataclass(frozen=True)
class Head:
    """Only the new modules of a classifier, over frozen features."""

    label: str

    def trainer(self, model: PreTrainedModel, budget: float | None, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer of what `new_modules` names."""
        model.requires_grad_(False)
        for name in new_modules(model):
            model.get_submodule(name).requires_grad_(True)
        return Trainer(model, **arguments)


@dataclass(frozen=True)
class Adapter:
    """A method of PEFT, named as in `recipes.parts.adapters`, on the linears of `target_modules`.

    The new modules of a classifier are trained whole beside it.
    """

    label: str
    method: str
    target_modules: str | list[str] = "qkv"

    def trainer(self, model: PreTrainedModel, budget: float, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer of an adapter with `budget` times the model's parameters."""
        new = new_modules(model)
        targets = find_targets(model, SMTConfig(target_modules=self.target_modules, exclude_modules=new or None))
        config = adapter_config(self.method, targets, budget * count_parameters(model), seed)
        config.modules_to_save = new or None
        return Trainer(peft.get_peft_model(model, config), **arguments)


@dataclass(frozen=True)
class Sparse:
    """SMT or SPSFT.

    Attributes:
        fields: fields of SMTConfig.
        share: of the budget that the chosen blocks get, where columns that depend on them take the rest.
    """

    label: str
    fields: dict = field(default_factory=dict)
    share: float = 1.0

    def trainer(self, model: PreTrainedModel, budget: float, seed: int, fields: dict, **arguments) -> Trainer:
        """Return an SMTTrainer of `budget` times the model's parameters. `fields` override the method's own."""
        config = SMTConfig(**{"budget": self.share * budget} | self.fields | fields)
        return SMTTrainer(model, smt_config=config, **arguments)
