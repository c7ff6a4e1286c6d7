"""Tiny image models, and data for them."""

import tiny
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from smt_trainer import SMTConfig

EDGE, LABELS = 16, 3


def resnet(seed: int = 0, num_labels: int = LABELS) -> nn.Module:
    """Build two stages of two bottlenecks each, with batch normalisation."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(**sizes, num_labels=num_labels)
        return transformers.ResNetForImageClassification(config).eval()


def convnext(seed: int = 0) -> nn.Module:
    """Build two stages with depthwise convolutions and linears, whose norms read one example at a time."""
    sizes = {"num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_scale_init_value": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.ConvNextConfig(**sizes, num_labels=LABELS)
        return ConvNextForImageClassification(config).eval()


class ConvNextForImageClassification(transformers.ConvNextForImageClassification):
    """A model that tells accelerate, which asks before it shards, that there are no input embeddings."""

    def get_input_embeddings(self) -> None:
        return None


class Bottleneck(nn.Module):
    """A bottleneck of ResNeXt: a 1x1, a grouped 3x3 and a 1x1 convolution, with a residual connection."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (x + self.bn3(self.conv3(y))).relu()


class ResNeXt(nn.Module):
    """Two bottlenecks with groups, the second depthwise, and a stem with a bias and circular padding."""

    main_input_name = "pixel_values"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="circular")
            self.blocks = nn.ModuleList([Bottleneck(16, 8, 2), Bottleneck(16, 8, 8)])
            self.head = nn.Linear(16, LABELS)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        x = self.stem(pixel_values).relu()
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean((2, 3)))
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def batch(count: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Make images of noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, EDGE, EDGE, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(count) % LABELS}


def examples(count: int = 16) -> list[dict[str, Tensor]]:
    """Make a data set of images."""
    images = batch(count)
    return [{name: values[place] for name, values in images.items()} for place in range(count)]


def config(**overrides) -> SMTConfig:
    """Make a configuration that suits the sizes here: 12 rows of all convolutions."""
    fields = {"target_modules": "all-conv", "granularity": "row", "block_size": "auto", "budget": 12}
    return tiny.config(**fields | overrides)
