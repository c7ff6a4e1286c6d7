"""The methods compared. Each trains the query, key and value projections, or the experts, with a given number of
parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import peft
from torch import nn

from recipes.parts.adapters import ADAPTERS, adapter_config
from smt_trainer import BlockScores, SMTConfig, convert_to_smt
from smt_trainer.model.targets import count_parameters, find_targets

FLOOR, SECOND_FLOOR, FULL, ROWS, SMT = "floor", "floor, second copy", "full fine-tuning", "SPSFT rows", "SMT blocks"
METHODS = (FULL, *ADAPTERS, ROWS, SMT)
# Base of `quantised.BITS` -> methods that cannot train over it. PEFT's DoRA loses the scales of 8 bits on a CPU.
UNABLE = {"nf4": (FULL, "Super-Tuning"), "int8": (FULL, "Super-Tuning", "DoRA")}
# Of PEFT's methods, only LoRA adapts 3-D parameters.
OF_EXPERTS = (FULL, "LoRA", ROWS, SMT)


class Variant(NamedTuple):
    """A method, the fraction of all parameters that it trains, and for SMT the lowest layer that may have blocks."""

    method: str
    budget: float | None = None
    lowest_layer: int = 0

    def make_trainable(self, model: nn.Module, seed: int, targets: str) -> nn.Module:
        """Make a plain model trainable in place and return the module to call."""
        if self.method == FULL:
            return model.requires_grad_(True)
        if self.method in (FLOOR, SECOND_FLOOR):
            # Nothing is trained, but backward goes through all layers.
            model.requires_grad_(False).enable_input_require_grads()
            return model
        if self.method in ADAPTERS:
            wanted = self.budget * count_parameters(model)
            found = find_targets(model, SMTConfig(target_modules=targets))
            if targets == "experts":
                return peft.get_peft_model(model, lora_of_experts(found, wanted))
            return peft.get_peft_model(model, adapter_config(self.method, found, wanted, seed))
        return make_sparse(self, model, seed, targets)

    def writes_to(self, parameter: str) -> bool:
        """Tell whether training changes the plain model's parameter of this name."""
        projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "experts.gate_up_proj", "experts.down_proj")
        return self.method == FULL or (self.method in (SMT, ROWS) and parameter.endswith(projections))


def lora_of_experts(matrices: Mapping[str, Any], parameters: float) -> peft.LoraConfig:
    """Return the configuration of LoRA on the experts' 3-D parameters, with the same rank for all experts."""
    each = sum(sum(matrix.weight_shape) for matrix in matrices.values())
    rank = max(1, round(parameters / each))
    names = sorted({f"mlp.experts.{matrix.leaf}" for matrix in matrices.values()})
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=names)


def make_sparse(variant: Variant, model: nn.Module, seed: int, targets: str) -> nn.Module:
    """Convert to SMT with random blocks or rows, spread evenly over the projections."""
    config = SMTConfig(
        target_modules=targets,
        budget=variant.budget,
        granularity="row" if variant.method == ROWS else "block",
        lowest_layer=variant.lowest_layer,
        score="random",
        scope="per_module",
    )
    return convert_to_smt(model, BlockScores.of(model, config, [], seed).select())
