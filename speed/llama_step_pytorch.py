# SPDX-License-Identifier: Apache-2.0
"""PyTorch as a contestant of speed/llama_step.py: Hugging Face's LlamaForCausalLM.

    DIR/bin/python -m speed.llama_step_pytorch '{"model": …}'

    steps N     seconds for N optimizer steps on a batch that lies on the device
    memory 0    the most bytes that the device had in use so far; 0 on a CPU

Scaled dot-product attention, autocast below fp32, a fused AdamW; with `recompute`, a layer's
activations are computed anew for the gradient, as this repository does.
"""

import json
import os
import sys
import time
from typing import Any

import torch

import tests.torchvision_models  # noqa: F401  Makes torchvision, which is imported next, load.

# isort: split
import transformers

from models.llama.architectures import ARCHITECTURES
from speed.contestants import Commands, serve
from workloads.llama31_8b import hugging_face


def contestant(case: dict[str, Any]) -> tuple[dict[str, Any], Commands]:
    """Its facts and commands; `case`: the flags of speed/llama_step.py."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # The tests' models use one.
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    architecture = ARCHITECTURES[case['model']]
    described = hugging_face.config(architecture, 'float32')
    config = transformers.LlamaConfig(**{n: x for n, x in described.items() if n != 'torch_dtype'})
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device)
    model.train()
    if case['recompute']:
        model.gradient_checkpointing_enable()
    if case['peer_compile'] != 'none':
        model.compile(mode=case['peer_compile'])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )
    half, shape = case['dtype'] != 'float32', (case['peer_batch'], case['length'] + 1)
    tokens = torch.randint(0, architecture.vocabulary, shape, device=device)
    micro_steps = case['batch'] * case['accumulation'] // case['peer_batch']

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def loss_of() -> torch.Tensor:
        with torch.autocast(device, getattr(torch, case['dtype']), enabled=half):
            logits = model(tokens[:, :-1], use_cache=False).logits
        flat = logits.float().reshape(-1, architecture.vocabulary)
        return torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))

    def steps(count: int) -> float:
        wait()
        before = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(micro_steps):
                (loss_of() / micro_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        wait()
        return time.perf_counter() - before

    steps(1)
    name = torch.cuda.get_device_name() if cuda else 'cpu'
    facts = {'version': f'PyTorch {torch.__version__}', 'device': name, 'devices': 1}
    memory = torch.cuda.max_memory_allocated if cuda else lambda: 0
    return facts, {'steps': steps, 'memory': lambda _: memory()}


if __name__ == '__main__':
    serve(lambda: contestant(json.loads(sys.argv[1])))
