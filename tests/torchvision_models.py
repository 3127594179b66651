# SPDX-License-Identifier: Apache-2.0
"""torchvision's models as the peers of the parity tests, by the names of `models/`."""

import pytest

torch = pytest.importorskip('torch')

# Importing torchvision needs the schemas of two detection operators. Where its compiled part does
# not load (another build of PyTorch), they are declared here; the models do not use them.
try:
    import torchvision
except RuntimeError:
    _schemas = torch.library.Library('torchvision', 'DEF')
    for _operator in ('nms', 'qnms'):
        _schemas.define(f'{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import torchvision
except ImportError:
    pytest.skip('needs torchvision', allow_module_level=True)

from torch import nn  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

torch.set_num_threads(1)  # Several threads wait for one another on a busy machine.


class SmallImageResNet(nn.Module):
    """torchvision's blocks under a 3×3 stem without a pool, which its own `ResNet` cannot have."""

    def __init__(self, block, blocks_per_stage, width, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = [f'layer{i + 1}' for i in range(len(blocks_per_stage))]
        channels = width
        for i, (stage, blocks) in enumerate(zip(self.stages, blocks_per_stage, strict=True)):
            planes, stride = width * 2**i, 1 if i == 0 else 2
            layers = []
            for j in range(blocks):
                stride = stride if j == 0 else 1
                shortcut = None
                if stride != 1 or channels != planes * block.expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                layers.append(block(channels, planes, stride, shortcut))
                channels = planes * block.expansion
            self.add_module(stage, nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        """Images [N, 3, H, W] to logits [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(x.mean(dim=(2, 3)))


def create(name: str, num_classes: int) -> nn.Module:
    """The peer of `models.create(name, …)`."""
    if name == 'resnet50':
        return torchvision.models.resnet50(weights=None, num_classes=num_classes)
    if name == 'resnet18_cifar':
        return SmallImageResNet(BasicBlock, (2, 2, 2, 2), 64, num_classes)
    if name == 'resnet8_cifar':
        return SmallImageResNet(BasicBlock, (1, 1, 1), 8, num_classes)
    if name == 'resnet_digits':
        return SmallImageResNet(Bottleneck, (1, 1, 1), 16, num_classes)
    raise KeyError(name)
