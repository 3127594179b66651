# SPDX-License-Identifier: Apache-2.0
"""What the compiled training step consists of, and that the benchmarks run.

Speed itself is measured (docs/performance.md). Here is what a machine without a GPU can hold the
step to: no work beyond the forward pass and its two gradients, nothing in the wrong precision, no
buffer twice.
"""

import collections
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

import train_lib
from models.resnet.batch_norm import BatchNorm
from settings.plan import make_plan
from tests.harness import TinyBottleneck, resolve
from workloads.resnet import optimizers
from workloads.resnet.task import ImageClassification

ROOT = Path(__file__).parents[2]
BATCH, SPAN, SIZE = 8, 4, 32
# TinyBottleneck's: stem; three blocks of three; a projection in either stage.
BLOCKS = 3
CONVOLUTIONS = 1 + 3 * BLOCKS + 2


@functools.cache
def lowered_step(task_type=TinyBottleneck, num_classes=10, **overrides):
    """The training step of one device, traced but not compiled."""
    shape = {'global_batch_size': BATCH, 'bn_span': SPAN, 'image_size': SIZE, 'seed': 1}
    config = resolve('digits', 'unused', **(shape | overrides))
    plan = make_plan(config, num_train=1000, num_eval=10, num_devices=1)
    optimizer, task = optimizers.create(config, plan), task_type(config, num_classes)
    mesh = Mesh(jax.devices()[:1], (train_lib.AXIS,))
    train, _ = train_lib.lower_steps(task, optimizer, plan.micro_batch, mesh)
    return train


@functools.cache
def compiled_step(micro_batch):
    """The training step of one device, compiled; BATCH examples are one or two micro-steps."""
    return lowered_step(per_device_batch=micro_batch).compile()


def operations(lowered):
    """How often every operation occurs in the StableHLO of a lowered program."""
    return collections.Counter(re.findall(r'\bstablehlo\.(\w+)', lowered.as_text()))


def test_the_step_is_the_forward_pass_and_two_gradients():
    found = operations(lowered_step(dtype='float32'))
    # Every convolution forward, by its kernel and by its input, save the stem's by the image.
    assert found['convolution'] == 3 * CONVOLUTIONS - 1
    assert found['dot_general'] == 3  # The head, likewise, of which the input needs its own.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_step_has_no_slow_operation(dtype):
    found = operations(lowered_step(dtype=dtype))
    slow = {'while', 'scatter', 'select_and_scatter', 'gather', 'sort', 'case', 'if', 'custom_call'}
    assert not {name: found[name] for name in slow & set(found)}


def test_barriers_keep_activations_from_being_read_again():
    # In every BatchNorm's gradient and every block's last ReLU; see docs/performance.md.
    found = operations(lowered_step(dtype='float32'))
    assert found['optimization_barrier'] == CONVOLUTIONS + BLOCKS


def test_float16_alone_has_one_loop():
    # The step that is tried again after an overflow; what is in it is not unrolled.
    found = operations(lowered_step(dtype='float16'))
    assert found['while'] == 1
    assert found['convolution'] == 3 * CONVOLUTIONS - 1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_convolutions_are_in_the_dtype_and_the_rest_is_fp32(dtype):
    text = lowered_step(dtype=dtype).as_text()
    assert 'f64' not in text
    short = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}[dtype]
    lines = [line for line in text.splitlines() if 'stablehlo.convolution' in line]
    types = {kind for line in lines for kind in re.findall(r'x([a-z]+\d+)>', line)}
    assert types == {short}
    others = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    assert {kind for line in others for kind in re.findall(r'x([a-z]+\d+)>', line)} == {'f32'}


def test_fp32_converts_nothing_as_large_as_an_activation():
    text = lowered_step(dtype='float32').as_text()
    converted = re.findall(r'stablehlo\.convert .*: \(tensor<([\dx]*)x(\w+)>\) -> ', text)
    smallest = BATCH * (SIZE // 8) ** 2 * 16  # Elements of the smallest activation.
    large = {
        (shape, kind)
        for shape, kind in converted
        if math.prod(map(int, shape.split('x'))) >= smallest
    }
    # The images, once, and the pool's comparison of positions.
    assert large == {(f'{BATCH}x{SIZE}x{SIZE}x3', 'ui8')}


def test_no_activation_is_transposed():
    text = lowered_step(dtype='float32').as_text()
    moved = re.findall(r'stablehlo\.transpose .*: \(tensor<([\dx]*)x\w+>\)', text)
    # Kernels of the gradients by a convolution's input are reversed; activations start with BATCH.
    assert not [shape for shape in moved if len(shape.split('x')) > 2 and shape.startswith('8x')]


def test_batch_norm_reads_activations_twice_forward_and_twice_backward():
    layer, x = BatchNorm(4), jnp.zeros((8, 6, 6, 16))
    variables = layer.init(jax.random.key(0), x, False)

    def total(params, x):
        y, _ = layer.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
        return (y * y).sum()

    def sums(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == 'reduce_sum':
                yield equation.invars[0].aval.size
            for inner in jaxprs_in_params(equation.params):
                yield from sums(inner)

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(variables['params'], x).jaxpr
    whole = [size for size in sums(jaxpr) if size == x.size]
    assert len(whole) == 1 + 2 + 2  # This test's own sum; mean and variance; their gradients.


@pytest.mark.parametrize('micro_batch', [BATCH, SPAN])
def test_the_state_is_updated_in_place(micro_batch):
    compiled = compiled_step(micro_batch)
    header = compiled.as_text().splitlines()[0]
    aliased = re.findall(r'\{(\d+)\}: \((\d+), \{\}', header)
    state = compiled.input_shardings[0][0]
    assert len(aliased) == len(jax.tree.leaves(state))
    assert all(output == argument for output, argument in aliased)
    memory = compiled.memory_analysis()
    assert (
        memory.alias_size_in_bytes > 0.9 * memory.argument_size_in_bytes - 2 * BATCH * SIZE**2 * 3
    )


def test_one_micro_step_has_no_accumulator():
    sizes = {size: compiled_step(size).memory_analysis() for size in (BATCH, SPAN)}
    count = sum(x.size for x in jax.tree.leaves(tiny_variables()))
    saved = sizes[SPAN].alias_size_in_bytes - sizes[BATCH].alias_size_in_bytes
    assert saved == pytest.approx(4 * count, rel=0.01)


def tiny_variables():
    task = TinyBottleneck(resolve('digits', 'unused', image_size=SIZE), 10)
    return jax.eval_shape(task.init, jax.random.key(0))


@pytest.mark.slow
def test_resnet50_takes_three_forward_passes_of_operations():
    step = lowered_step(
        ImageClassification,
        num_classes=1000,
        model='resnet50',
        image_size=224,
        global_batch_size=2,
        bn_span=2,
    )
    stem = 2 * 112 * 112 * 7 * 7 * 3 * 64
    forward = forward_operations()
    assert forward == pytest.approx(8.2e9, rel=0.01)
    # Batch normalisation, ReLU and the update are the rest; XLA counts padded taps as no work.
    assert step.cost_analysis()['flops'] / 2 == pytest.approx(3 * forward - stem, rel=0.05)


def forward_operations():
    """Operations of ResNet-50's convolutions and head for a 224×224 image, two to a product."""
    total, size, channels = 2 * 112 * 112 * 7 * 7 * 3 * 64, 56, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            out = size // stride
            total += 2 * size**2 * channels * width
            total += 2 * out**2 * (9 * width * width + width * 4 * width)
            total += 0 if block else 2 * out**2 * channels * 4 * width
            size, channels = out, 4 * width
    return total + 2 * 2048 * 1000


def run(*command, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_help_needs_no_jax():
    program = (
        'import sys, runpy\n'
        "sys.argv = ['main.py', '--help']\n"
        "try: runpy.run_path('main.py', run_name='__main__')\n"
        'except SystemExit: pass\n'
        "sys.exit(sum(name in sys.modules for name in ('jax', 'flax', 'optax', 'orbax', 'grain')))"
    )
    done = run('-c', program)
    assert done.returncode == 0, done.stderr
    assert '--profile' in done.stdout


def test_the_loop_imports_nothing_that_it_does_not_use():
    heavy = ('torch', 'tensorflow', 'sklearn', 'matplotlib', 'pandas')
    program = 'import sys; from training import train_loop; '
    program += f'print([m for m in {heavy} if sys.modules.get(m)])'
    done = run('-c', program)
    assert done.stdout == '[]\n', done.stderr


@pytest.mark.parametrize('text', ['5', '5:5', '6:5', '-1:3', 'a:b'])
def test_a_profile_of_no_steps_is_refused(text):
    done = run('main.py', '--workdir=unused', f'--profile={text}')
    assert done.returncode == 2
    assert 'START:STOP' in done.stderr


TINY = ('--config=configs/digits.py', '--model=resnet_digits', '--image_size=8', '--classes=10')


@pytest.mark.slow
def test_train_step_benchmark_runs(tmp_path, digits_dir):
    results = tmp_path / 'results.jsonl'
    peer = ('--peer=pytorch', '--peer_compile=none') if has_torch() else ()
    done = run(
        'speed/train_step.py',
        *TINY,
        *('--dtypes=bfloat16', '--batches=8', '--accumulation=2', '--span=4', '--rounds=1'),
        *('--steps=1', '--loop_steps=3', '--checkpoint_every=2', '--ceiling_size=64'),
        *(f'--data_dir={digits_dir}', f'--json={results}', *peer),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(results.read_text())
    assert result['accumulation'] == 2
    measured = {'bare', 'loop', 'input', 'tflops', 'gbytes', 'roofline', 'memory_gib'}
    measured |= {'peer', 'bare/peer'} if peer else set()
    assert all(result[name] > 0 for name in measured)
    assert done.stdout.splitlines()[-1].startswith('| bfloat16 | 8 × 2 | ')


def has_torch():
    return run('-c', 'import torch').returncode == 0


@pytest.mark.slow
def test_fp32_check_runs():
    done = run('speed/fp32_check.py', '--batch=2', '--image_size=32')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('relative error') == 2


@pytest.mark.slow
def test_a_profile_is_written(tmp_path, digits_dir):
    done = run(
        'main.py',
        f'--workdir={tmp_path / "run"}',
        f'--config.data_dir={digits_dir}',
        '--config.max_epochs=1',
        '--config.eval_every_epochs=1',
        '--profile=2:4',
    )
    assert done.returncode in (0, 1), done.stderr
    written = list((tmp_path / 'run' / 'profile').glob('plugins/profile/*/*'))
    assert {path.name.split('.', 1)[1] for path in written} >= {'trace.json.gz', 'xplane.pb'}
