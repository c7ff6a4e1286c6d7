"""Build models with shapes but no values, from their configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import nn

from smt_trainer.errors import SMTError, first_line
from smt_trainer.model.kinds import is_linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

META = torch.device("meta")


def builder(model: str | Path | PretrainedConfig, dtype: torch.dtype) -> Callable[..., PreTrainedModel]:
    """Return a function that builds the model, on the meta device unless it is given another one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(device: torch.device = META) -> PreTrainedModel:
        with device:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()

    try:
        config = AutoConfig.from_pretrained(model) if isinstance(model, (str, Path)) else model
        build()
    except Exception as error:  # an odd configuration makes transformers raise anything
        raise SMTError(f"no causal language model can be built from {model}: {first_line(error)}") from error
    return build


def without_linear_weights(build: Callable[..., nn.Module]) -> nn.Module:
    """Build the model with values, except for the weights of its linears: the search for dependencies ignores them."""
    with init_empty_weights(include_buffers=False):
        model = build(torch.device("cpu"))
    for module in model.modules():
        if not is_linear(module):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.rand_like(parameter, device="cpu") + 0.5))
    return model
