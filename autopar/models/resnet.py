"""Residual networks for images, plain torch, modules named as in torchvision.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), with the stride of a bottleneck on
its 3x3 convolution ("v1.5").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ResNetConfig:
    """Blocks a stage, channels of the first stage, and what goes in and out."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    width: int = 64
    classes: int = 1000
    channels: int = 3


RESNETS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetConfig((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetConfig((3, 4, 6, 3)),
    "resnet101": ResNetConfig((3, 4, 23, 3)),
    "resnet152": ResNetConfig((3, 8, 36, 3)),
}


def _downsample(inplanes: int, outplanes: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inplanes, H, W) -> (N, planes, H/stride, W/stride)."""

    expansion: ClassVar[int] = 1

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        joined: Tensor = self.relu(out + shortcut)
        return joined


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: (N, inplanes, H, W) -> (N, 4 planes, H/stride, W/stride)."""

    expansion: ClassVar[int] = 4

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inplanes, outplanes, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        joined: Tensor = self.relu(out + shortcut)
        return joined


class ResNet(nn.Module):
    """(N, channels, H, W) images -> (N, classes) logits."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        block = Bottleneck if config.bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(config.channels, config.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inplanes = config.width
        for stage, count in enumerate(config.blocks):
            planes, stride = config.width * 2**stage, 1 if stage == 0 else 2
            blocks = []
            for index in range(count):
                blocks.append(block(inplanes, planes, stride if index == 0 else 1))
                inplanes = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet(name: str) -> ResNet:
    """The ResNet called `name` in RESNETS."""
    return ResNet(RESNETS[name])
