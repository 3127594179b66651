# SPDX-License-Identifier: Apache-2.0
"""PyTorch as a contestant of speed/train_step.py: torchvision's model as it trains fastest.

    DIR/bin/python -m speed.train_step_pytorch '{"model": …}'

    steps N  seconds for N optimizer steps on a batch that lies on the device

Channels last, autocast, compiled, a fused optimizer.
"""

import json
import os
import sys
import time
from typing import Any

import torch

from speed import contestants
from tests.torchvision_models import create


class PyTorch:
    """The model, and what it can be asked; the arguments are as those of `Ours`."""

    def __init__(self, case: dict[str, Any]):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # The tests' models use one.
        cuda = torch.cuda.is_available()
        self.device = 'cuda' if cuda else 'cpu'
        self.micro_steps = case['accumulation']
        torch.manual_seed(0)
        # True fp32, as ours; half precision is not affected.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        model: Any = create(case['model'], case['classes'])
        model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        half = case['dtype'] != 'float32'
        self.scaler = torch.amp.GradScaler(self.device, enabled=case['dtype'] == 'float16')
        size, batch = case['image_size'], case['batch']
        means = torch.tensor([123.68, 116.78, 103.94], device=self.device)[None, :, None, None]
        image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        self.image = image.to(self.device, memory_format=torch.channels_last)
        self.label = torch.randint(0, case['classes'], (batch,), device=self.device)
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

        def loss_of(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device, getattr(torch, case['dtype']), enabled=half):
                return criterion(model(image.float() - means), label)

        mode = case['peer_compile']
        self.loss_of = loss_of if mode == 'none' else torch.compile(loss_of, mode=mode)
        self.commands = {'steps': self.steps}
        self.steps(1)
        self.facts = {
            'version': f'PyTorch {torch.__version__}',
            'device': torch.cuda.get_device_name() if cuda else 'cpu',
            'devices': 1,
        }

    def _wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def steps(self, count: int) -> float:
        """Seconds for `count` optimizer steps."""
        self._wait()
        before = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(self.micro_steps):
                loss = self.loss_of(self.image, self.label) / self.micro_steps
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._wait()
        return time.perf_counter() - before


if __name__ == '__main__':
    contestants.serve(lambda: PyTorch(json.loads(sys.argv[1])))
