"""The compared methods of fine-tuning, a dataclass for each. All are trained by transformers' Trainer."""

from dataclasses import dataclass, field

import peft
from torch import nn
from transformers import PreTrainedModel, Trainer

from recipes.parts.adapters import adapter_config
from recipes.parts.new_modules import new_modules
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
        """Return a Trainer that trains all parameters."""
        return Trainer(model.requires_grad_(True), **arguments)


@dataclass(frozen=True)
class Head:
    """Training only the new modules of a classifier, over frozen features."""

    label: str

    def trainer(self, model: PreTrainedModel, budget: float | None, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer that trains only the modules that `new_modules` names."""
        model.requires_grad_(False)
        for name in new_modules(model):
            model.get_submodule(name).requires_grad_(True)
        return Trainer(model, **arguments)


@dataclass(frozen=True)
class Adapter:
    """A PEFT method, named as in `recipes.parts.adapters`, on the linears of `target_modules`.

    The new modules of a classifier are also trained, whole.
    """

    label: str
    method: str
    target_modules: str | list[str] = "qkv"

    def trainer(self, model: PreTrainedModel, budget: float, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer that trains an adapter of about `budget` times the model's parameters."""
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
        share: share of the budget for the chosen blocks; the rest is for the columns that depend on them.
    """

    label: str
    fields: dict = field(default_factory=dict)
    share: float = 1.0

    def trainer(self, model: PreTrainedModel, budget: float, seed: int, fields: dict, **arguments) -> Trainer:
        """Return an SMTTrainer of about `budget` times the model's parameters. `fields` override the method's own."""
        config = SMTConfig(**{"budget": self.share * budget} | self.fields | fields)
        return SMTTrainer(model, smt_config=config, **arguments)
