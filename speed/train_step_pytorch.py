# SPDX-License-Identifier: Apache-2.0
"""PyTorch as a contestant of speed/train_step.py: torchvision's model as it trains fastest.

    DIR/bin/python -m speed.train_step_pytorch '{"model": …}'

    steps N  seconds for N optimizer steps on a batch that lies on the device

Autocast, compiled, a fused optimizer; the layout is the case's.
"""

import json
import os
import sys
import time
from typing import Any

import torch

from speed.contestants import Commands, serve
from tests.torchvision_models import create


def contestant(case: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    """Its facts and commands; `case` as that of `Ours`."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # The tests' models use one.
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.manual_seed(0)
    # True fp32, as ours; half precision is not affected.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    layout = getattr(torch, case['peer_layout'])
    there: dict[str, Any] = {'device': device, 'memory_format': layout}
    model = create(case['model'], case['classes']).to(**there)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
    )
    half = case['dtype'] != 'float32'
    scaler = torch.amp.GradScaler(device, enabled=case['dtype'] == 'float16')
    size, batch, micro_steps = case['image_size'], case['batch'], case['accumulation']
    means = torch.tensor([123.68, 116.78, 103.94], device=device)[None, :, None, None]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(**there)
    labels = torch.randint(0, case['classes'], (batch,), device=device)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def eager_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, getattr(torch, case['dtype']), enabled=half):
            return criterion(model(images.float() - means), labels)

    mode = case['peer_compile']
    loss_of = eager_loss if mode == 'none' else torch.compile(eager_loss, mode=mode)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def steps(count: int) -> float:
        wait()
        before = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(micro_steps):
                scaler.scale(loss_of(images, labels) / micro_steps).backward()
            scaler.step(optimizer)
            scaler.update()
        wait()
        return time.perf_counter() - before

    steps(1)
    name = torch.cuda.get_device_name() if cuda else 'cpu'
    facts = {'version': f'PyTorch {torch.__version__}', 'device': name, 'devices': 1}
    return facts, {'steps': steps}


if __name__ == '__main__':
    serve(lambda: contestant(json.loads(sys.argv[1])))
