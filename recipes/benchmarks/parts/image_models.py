"""Image models with random weights: those of SPSFT's table 2, and ResNet-50."""

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

RESNET101_DEPTHS = [3, 4, 23, 3]


def vit(labels: int) -> nn.Module:
    """Build ViT-B/16."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=labels))


def deit(labels: int) -> nn.Module:
    """Build DeiT-B/16, distilled: with a head for the label and one for the teacher's."""
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(num_labels=labels))


def resnet50(labels: int) -> nn.Module:
    """Build ResNet-50."""
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=labels))


def resnet101(labels: int) -> nn.Module:
    """Build ResNet-101."""
    config = transformers.ResNetConfig(num_labels=labels, depths=RESNET101_DEPTHS)
    return transformers.ResNetForImageClassification(config)


class Normalised(nn.Sequential):
    """A convolution without bias, then batch normalisation."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(into, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """A 1x1, a grouped 3x3 and a 1x1 convolution, with a shortcut around them."""

    def __init__(self, into: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        # With 32 groups of 8 channels (16, 32, 64 in later stages), the inner width equals the outer one.
        self.first = Normalised(into, out, 1)
        self.second = Normalised(out, out, 3, stride, groups)
        self.third = Normalised(out, out, 1)
        self.shortcut = Normalised(into, out, 1, stride) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.second(self.first(x).relu()).relu())
        return (self.shortcut(x) + y).relu()


class ResNeXt101(nn.Module):
    """ResNeXt-101 32x8d (Xie et al., 2017), which transformers does not have."""

    main_input_name = "pixel_values"

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.stem, width, layers = Normalised(3, 64, 7, stride=2), 64, []
        for stage, depth in enumerate(RESNET101_DEPTHS):
            for place in range(depth):
                layers.append(Bottleneck(width, 256 * 2**stage, 2 if stage and not place else 1, 32))
                width = 256 * 2**stage
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        x = F.max_pool2d(self.stem(pixel_values).relu(), 3, 2, padding=1)
        logits = self.classifier(self.layers(x).mean((2, 3)))
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def images(count: int, edge: int, labels: int, seed: int) -> dict[str, Tensor]:
    """Return images of noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, edge, edge, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(labels, (count,), generator=generator)}
