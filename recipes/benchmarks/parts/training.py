"""A model that one method makes trainable, and its training step."""

import copy

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from recipes.benchmarks.parts.methods import Variant
from recipes.benchmarks.parts.quantised import quantisation_states
from recipes.benchmarks.parts.setting import DTYPES, Setting


class Training:
    """Training of one variant. Changes `model` in place and allocates the optimizer's state before the first step."""

    def __init__(self, model: nn.Module, variant: Variant, setting: Setting) -> None:
        self.setting = setting
        self.model = variant.make_trainable(model, setting.seed, setting.targets).train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = None
        if self.parameters:
            # Without weight decay, a step of all-zero gradients changes nothing.
            self.optimizer = torch.optim.AdamW(self.parameters, fused=True, weight_decay=0)
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.update()

    @property
    def trainable(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def loss(self, tokens: Tensor) -> Tensor:
        """Run forward and return the loss."""
        dtype = DTYPES[self.setting.dtype]
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            if not self.setting.chunked_loss:
                return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            head = model.get_output_embeddings().weight
            return F.linear_cross_entropy(
                hidden[:, :-1].flatten(0, 1), head, tokens[:, 1:].flatten(), options=nn.LinearCrossEntropyOptions()
            )

    def update(self) -> None:
        """Update the weights and clear the gradients."""
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, tokens: Tensor) -> None:
        """Take one whole step: forward, backward, update."""
        self.loss(tokens).backward()
        self.update()


def copy_for(variant: Variant, model: nn.Module) -> nn.Module:
    """Copy a model but share the parameters that the method does not change, so that many copies fit in memory."""
    shared = [
        parameter
        for name, parameter in model.named_parameters()
        # No method writes to a quantised weight.
        if not (variant.writes_to(name) and parameter.is_floating_point())
    ]
    return copy.deepcopy(model, {id(each): each for each in (*shared, *quantisation_states(model))})


def start(variant: Variant, model: nn.Module, setting: Setting) -> Training:
    """Make a `Training`, with the arguments in the order that `functools.partial(start, variant)` needs."""
    return Training(model, variant, setting)
