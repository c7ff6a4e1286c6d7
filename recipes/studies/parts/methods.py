"""The methods compared: a record each. All are trained by transformers' Trainer, on the same records in one order."""

from dataclasses import dataclass, field

import peft
from transformers import PreTrainedModel, Trainer

from recipes.parts.adapters import adapter_config
from smt_trainer import SMTConfig, SMTTrainer
from smt_trainer.model.targets import count_parameters, find_targets


@dataclass(frozen=True)
class Full:
    """Full fine-tuning."""

    label: str

    def trainer(self, model: PreTrainedModel, budget: float | None, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer of all parameters."""
        return Trainer(model.requires_grad_(True), **arguments)


@dataclass(frozen=True)
class Adapter:
    """A method of PEFT, named as in `recipes.parts.adapters`, on the linears of `target_modules`."""

    label: str
    method: str
    target_modules: str = "qkv"

    def trainer(self, model: PreTrainedModel, budget: float, seed: int, fields: dict, **arguments) -> Trainer:
        """Return a Trainer of an adapter with `budget` times the model's parameters."""
        targets = find_targets(model, SMTConfig(target_modules=self.target_modules))
        config = adapter_config(self.method, targets, budget * count_parameters(model), seed)
        return Trainer(peft.get_peft_model(model, config), **arguments)


@dataclass(frozen=True)
class Sparse:
    """SMT or SPSFT.

    Attributes:
        fields: fields of SMTConfig that differ from the studies' own (`COMMON`).
    """

    label: str
    fields: dict = field(default_factory=dict)

    def trainer(self, model: PreTrainedModel, budget, seed: int, fields: dict, **arguments) -> Trainer:
        """Return an SMTTrainer of `budget` times the model's parameters. `fields` override all others."""
        config = SMTConfig(**COMMON | {"budget": budget} | self.fields | fields)
        return SMTTrainer(model, smt_config=config, **arguments)


COMMON = {"block_size": 64, "smt_warmup_steps": 10}
"""Fields of SMTConfig: blocks of 64x64 meet a budget to 1 %."""

ROWS = {"granularity": "row", "block_size": "auto"}

METHODS: dict[str, Full | Adapter | Sparse] = {
    "full": Full("full fine-tuning"),
    "smt": Sparse("SMT"),
    "random": Sparse("random blocks", {"score": "random"}),
    "lora": Adapter("LoRA", "LoRA"),
    "dora": Adapter("DoRA", "DoRA"),
    "rslora": Adapter("rsLoRA", "rsLoRA"),
    "miss": Adapter("MiSS", "MiSS"),
    "shira": Adapter("SHiRA", "SHiRA"),
    "super": Adapter("Super-Tuning", "Super-Tuning"),
    "spsft": Sparse("SPSFT rows, magnitude", ROWS | {"score": "magnitude"}),
    "spsft-taylor": Sparse("SPSFT rows, taylor", ROWS | {"score": "taylor"}),
    "smt-all": Sparse("SMT, all linears", {"target_modules": "all-linear"}),
    "lora-all": Adapter("LoRA, all linears", "LoRA", "all-linear"),
    "full-warm-up": Sparse("SMT after full steps"),
}
"""Name -> method."""
