# SPDX-License-Identifier: Apache-2.0
"""Twenty steps in fp64 beside Hugging Face's model with PyTorch's AdamW and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.llama import network
from models.llama.architectures import Architecture
from models.llama.layer import Layer
from workloads.llama31_8b import hugging_face, optimizers
from workloads.llama31_8b.task import LanguageModelling

torch = pytest.importorskip('torch')
pytest.importorskip('tests.torchvision_models')  # Makes torchvision, which is imported next, load.
transformers = pytest.importorskip('transformers')

from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

SIZES = Architecture(2, 64, 160, 8, 2, 8, 512)
LENGTH, MICRO_BATCHES, EACH, STEPS = 128, 4, 2, 20
BASE, END, WARMUP, LAST = 3e-3, 3e-4, 5, 40
ADAMW = {'beta_1': 0.9, 'beta_2': 0.95, 'epsilon': 1e-5, 'weight_decay': 0.1}


def tokens_of(step: int) -> np.ndarray:
    """[micro-batches, sequences, length + 1]; some tokens are frequent, so that there is a loss."""
    rng = np.random.default_rng([3, step])
    shape = (MICRO_BATCHES, EACH, LENGTH + 1)
    return np.minimum(rng.geometric(0.02, shape), SIZES.vocabulary - 1).astype(np.int32)


def ours(params):
    """Losses, and the weights after the last step by Hugging Face's names."""
    schedule = optimizers.learning_rate_schedule(BASE, END, WARMUP, LAST)
    optimizer = optax.chain(
        optimizers.clip(1.0, optax.tree.norm), optimizers.adamw(schedule, **ADAMW)
    )
    state, losses = optimizer.init(params), []

    @jax.jit
    def gradient_of(params, micro):
        return network.gradient(params, micro, Layer(SIZES, jnp.dtype('float64')), jnp.float64(1))

    @jax.jit
    def moved(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(STEPS):
        found = [gradient_of(params, micro) for micro in tokens_of(number)]
        loss, gradient = jax.tree.map(lambda *x: sum(x) / len(x), *found)
        params, state = moved(params, state, gradient)
        losses.append(float(loss))
    return losses, dict(hugging_face.exported(jax.device_get(params)))


class Rotary(torch.nn.Module):
    """Hugging Face's rotary embedding in fp64."""

    def forward(self, x, position_ids):
        pairs = np.arange(0, SIZES.head_size, 2) / SIZES.head_size
        frequencies = SIZES.rotary_base**-pairs
        turns = SIZES.original_length * frequencies / (2 * np.pi)
        part = np.clip((turns - 1) / (4 - 1), 0, 1)  # Of the unscaled frequency.
        scaled = torch.tensor(part * frequencies + (1 - part) * frequencies / 8)
        angles = (position_ids[..., None].double() * scaled).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def theirs(weights):
    """The same of PyTorch."""
    config = transformers.LlamaConfig(
        vocab_size=SIZES.vocabulary,
        hidden_size=SIZES.width,
        intermediate_size=SIZES.feed_forward,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.key_value_heads,
        head_dim=SIZES.head_size,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rope_parameters={
            'rope_type': 'llama3',
            'rope_theta': SIZES.rotary_base,
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': SIZES.original_length,
        },
    )
    model = transformers.LlamaForCausalLM(config).double()
    # Its own of these compute in fp32, whatever the weights.
    model.model.rotary_emb = Rotary()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(SIZES.width, eps=child.variance_epsilon)
                setattr(module, name, norm.double())
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {'params': matrices, 'weight_decay': ADAMW['weight_decay']},
            {'params': vectors, 'weight_decay': 0.0},
        ],
        betas=(ADAMW['beta_1'], ADAMW['beta_2']),
        eps=ADAMW['epsilon'],
    )
    losses = []
    for number in range(STEPS):
        if number <= WARMUP:
            rate = BASE * (number + 1) / (WARMUP + 1)
        else:
            done = (number - WARMUP) / (LAST - WARMUP)
            rate = END + (BASE - END) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.zero_grad()
        total = 0.0
        for micro in torch.tensor(tokens_of(number), dtype=torch.int64):
            logits = model(micro[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, SIZES.vocabulary), micro[:, 1:].reshape(-1)
            )
            (loss / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses, {n: x.numpy() for n, x in model.state_dict().items()}


def test_twenty_steps_are_those_of_pytorch():
    with jax.enable_x64(True):
        task = LanguageModelling(SIZES, LENGTH, 'float64')
        variables = jax.jit(task.init)(jax.random.key(1))
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
        losses, weights = ours(params)
    expected, expected_weights = theirs(dict(hugging_face.exported(params)))
    np.testing.assert_allclose(losses, expected, rtol=1e-8)
    assert losses[-1] < losses[0] - 0.3  # It has learnt something.
    assert weights.keys() == expected_weights.keys()
    for name, array in weights.items():
        scale = np.abs(expected_weights[name]).max()
        np.testing.assert_allclose(array, expected_weights[name], atol=1e-8 * scale, err_msg=name)
