"""Residual networks: shapes, and names as in torchvision."""

from __future__ import annotations

import pytest
import torch

from autopar.models.resnet import RESNETS, ResNet, ResNetConfig, resnet


@pytest.mark.parametrize("name", RESNETS)
def test_images_become_logits_of_every_class(name: str) -> None:
    with torch.device("meta"):
        assert resnet(name)(torch.zeros(3, 3, 64, 64)).shape == (3, 1000)


def test_modules_are_named_as_in_torchvision() -> None:
    with torch.device("meta"):
        names = {name for name, _ in resnet("resnet50").named_parameters()}
    assert {"conv1.weight", "bn1.bias", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias",
            "layer3.5.conv3.weight", "layer4.2.bn2.weight", "fc.weight", "fc.bias"} <= names
    assert len(names) == 161
    assert not any(name.startswith(("layer1.1.downsample", "layer5")) or "conv1.bias" in name for name in names)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_small_one_learns(bottleneck: bool) -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig((1, 1, 1, 1), bottleneck, width=4, classes=3, channels=1))
    images, classes = torch.randn(6, 1, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(images), classes)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
