"""Run a model whose layers all output noise, to see which inputs turn 0 when some outputs are set to 0.

It runs on one token repeated, or on images of noise; the weights of its layers do not matter.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smt_trainer.model.convolution import is_convolution, padded
from smt_trainer.model.grid import BlockGrid

# A ReLU hides a column if it sets the noise to 0 at all tokens; the chance is 1 in 2**TOKENS.
TOKENS = 32

# Edge of an image if the model's config names none.
IMAGE_SIZE = 32


@contextlib.contextmanager
def layers_output_noise(
    model: nn.Module, linears: Mapping[str, nn.Module], grids: Mapping[str, BlockGrid]
) -> Generator[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """Make the linears output noise within this context.

    Yields a function from the outputs that are set to 0 (module name -> [O] bool) to the inputs that are then 0 at all
    tokens or positions (module name -> [I] bool, for modules that some token reached).
    """
    generator = torch.Generator().manual_seed(0)
    zeros: dict[str, Tensor] = {}
    is_zero: dict[str, Tensor] = {}

    @functools.cache
    def noise(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def forward(name: str, input: Tensor) -> Tensor:
        # Spatial dimensions come after the channels.
        space = len(grids[name].kernel)
        if input.numel():
            zero = (input == 0).movedim(-1 - space, -1).flatten(0, -2).all(0)
            is_zero[name] = zero & is_zero.get(name, zero)
        shape = output_shape(name, input) if space else (*input.shape[:-1], grids[name].out_features)
        output = noise(name, shape, input.device, input.dtype)
        if name not in zeros:
            return output
        return output.masked_fill(zeros[name].to(output.device).view(-1, *[1] * space), 0)

    def output_shape(name: str, input: Tensor) -> tuple[int, ...]:
        conv: Any = linears[name]
        x, geometry = padded(conv, input.to("meta"))
        y = geometry.product(x, conv.weight.to("meta", x.dtype), None)
        return tuple(y.shape[y.ndim - input.ndim :])

    @torch.no_grad()
    def zero_columns(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zeros.clear()
        is_zero.clear()
        zeros.update(outputs)
        body(**inputs)
        return {name: zero.cpu() for name, zero in is_zero.items()}

    # Run without the head, which may need particular tokens.
    body: Any = getattr(model, "base_model", model)
    inputs = _inputs(model, generator)
    training = [module for module in model.modules() if module.training]
    forwards = {linear: functools.partial(forward, name) for name, linear in linears.items()}
    forwards |= {module: _pass for module in model.modules() if "BatchNorm" in type(module).__name__}
    replaced = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    model.eval()
    for module, replacement in forwards.items():
        module.forward = replacement
    try:
        yield zero_columns
    finally:
        for module in forwards:
            del module.forward
            if module in replaced:
                module.forward = replaced[module]
        for module in training:
            module.training = True


def _pass(input: Tensor, *args, **kwargs) -> Tensor:
    return input


def _inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the inputs to run a model on: `TOKENS` equal tokens, or images of the size that it was made for."""
    first, config = next(model.parameters()), getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = next(module.in_channels for module in model.modules() if is_convolution(module))
        # A single image if it is large: it has patches or positions enough.
        count = TOKENS if height * width <= IMAGE_SIZE**2 else 1
        pixels = torch.randn(count, channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(first.device, first.dtype)}
    inputs = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long, device=first.device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
