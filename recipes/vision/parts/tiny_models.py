"""Tiny image models trained on the digits 0 to 4: bases for learning 5 to 9. Trained once, in seconds."""

import logging
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from recipes.parts.model import made_once
from recipes.parts.tiny_training import train_steps
from recipes.vision.parts.digits import EDGE, read_digits

logger = logging.getLogger(__name__)

KNOWN = range(5)
STEPS, BATCH, RATE, SEED = 200, 50, 2e-3, 1234
TINY_VIT, TINY_RESNET = "tiny-vit", "tiny-resnet"


def build(name: str, labels: int) -> PreTrainedModel:
    """Build a tiny model with random weights: a ViT of 4 layers and patches of 7x7, or a ResNet of 3 stages."""
    if name == TINY_RESNET:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=labels, **sizes))
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(
        ViTConfig(image_size=EDGE, patch_size=7, num_channels=1, num_labels=labels, **sizes)
    )


def resolve_tiny(name: str) -> str:
    """Return the folder of a tiny model without its head; train it on the known digits on first use."""
    return made_once(f"{name}-{STEPS}-{SEED}", lambda folder: _train(name, folder))


def _train(name: str, folder: Path) -> None:
    logger.info("Training %s on the digits 0 to 4 (once, %d steps)", name, STEPS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(name, len(KNOWN))
        digits = read_digits(KNOWN)[:]
        loss = train_steps(model, digits, BATCH, STEPS, RATE)
    logger.info("%s: loss %.3f at the last step", name, loss)
    model.base_model.save_pretrained(folder / "checkpoint")
