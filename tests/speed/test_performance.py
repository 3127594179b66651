# SPDX-License-Identifier: Apache-2.0
"""What the training step consists of, and that the programs that measure speed run.

Speed itself is measured (docs/performance.md). Here is what a machine without a GPU can hold the
step to: no work beyond the forward pass and its two gradients, nothing in the wrong precision, no
buffer twice. The step is read as JAX traces it, whatever a compiler then makes of it.
"""

import functools
import gc
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.sharding import Mesh

import train_lib
from models.resnet.batch_norm import BatchNorm
from tests.end_to_end.program import share_programs
from tests.harness import TinyBottleneck, equations, model_for, plan_for, resolve
from training import compilation
from training.workload import check_split
from workloads.resnet.task import ImageClassification

ROOT = Path(__file__).parents[2]
BATCH, SPAN, SIZE = 8, 4, 32
# TinyBottleneck's: stem; three blocks of three; a projection in either stage.
BLOCKS = 3
CONVOLUTIONS = 1 + 3 * BLOCKS + 2
POINTWISE = 2 * BLOCKS + 2  # Of these 1×1, which fp32 has as products of matrices.


def parts(task_type=TinyBottleneck, num_classes=10, **overrides) -> tuple:
    """Model, micro-batch size and mesh of a training step on one device."""
    shape = {'global_batch_size': BATCH, 'micro_batch_size': BATCH, 'bn_span': SPAN}
    shape |= {'image_size': SIZE, 'seed': 1}
    config = resolve('digits', 'unused', **(shape | overrides))
    model = model_for(config, plan_for(config, num_train=1000), task_type(config, num_classes))
    return model, config.micro_batch_size, Mesh(jax.devices()[:1], (train_lib.AXIS,))


@functools.cache
def program_of(**overrides) -> Jaxpr:
    """The training step as it is traced."""
    return compilation.trace_train(*parts(**overrides)).jaxpr.jaxpr


def operations(name, **overrides) -> list[JaxprEqn]:
    """The operations of one kind in the step."""
    return [e for e in equations(program_of(**overrides)) if e.primitive.name == name]


def described(variable) -> Any:
    """A variable's shape, size and dtype."""
    return variable.aval


def test_the_step_is_the_forward_pass_and_two_gradients():
    # Every convolution forward, by its kernel and by its input, save the stem's by the image.
    windows = CONVOLUTIONS - POINTWISE
    assert len(operations('conv_general_dilated', dtype='float32')) == 3 * windows - 1
    assert len(operations('conv_general_dilated', dtype='bfloat16')) == 3 * CONVOLUTIONS - 1
    # The head, likewise, of which the input needs its own.
    assert len(operations('dot_general', dtype='float32')) == 3 * (POINTWISE + 1)
    assert len(operations('dot_general', dtype='bfloat16')) == 3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_step_has_no_slow_operation(dtype):
    slow = r'while|scan|cond|.*scatter.*|gather|sort|.*callback'
    found = [
        e.primitive.name
        for e in equations(program_of(dtype=dtype))
        # A condition that is a constant (optax.MultiSteps has one) is none in the program.
        if re.fullmatch(slow, e.primitive.name) and not isinstance(e.invars[0], Literal)
    ]
    assert not found


def test_barriers_keep_activations_from_being_read_again_and_a_micro_batch_apart():
    # In every BatchNorm, its gradient and every block's last ReLU; see docs/performance.md. The
    # steps have three and two around a micro-batch's part and its sums (train_lib.py).
    found = operations('optimization_barrier', dtype='bfloat16')
    assert len(found) == 2 * CONVOLUTIONS + BLOCKS + 3
    model, size, mesh = parts(dtype='bfloat16')
    evaluation = compilation.trace_evaluate(model.task, size, mesh).jaxpr.jaxpr
    names = [e.primitive.name for e in equations(evaluation)]
    assert names.count('optimization_barrier') == 2


def test_float16_alone_has_one_loop():
    # The step that is tried again after an overflow; what is in it is not unrolled.
    assert len(operations('while', dtype='float16')) == 1
    assert len(operations('conv_general_dilated', dtype='float16')) == 3 * CONVOLUTIONS - 1


def dtypes(found: list[JaxprEqn]) -> set[str]:
    """Of all that the operations take and give."""
    return {str(described(v).dtype) for e in found for v in (*e.invars, *e.outvars)}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_convolutions_are_in_the_dtype_and_the_rest_is_fp32(dtype):
    assert dtypes(operations('conv_general_dilated', dtype=dtype)) == {dtype}
    assert dtypes(operations('dot_general', dtype=dtype)) == {'float32'}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_64_bits_are_of_sums_alone_and_nothing_is_float64(dtype):
    model, size, mesh = parts(dtype=dtype)
    for program in (
        program_of(dtype=dtype),
        compilation.trace_evaluate(model.task, size, mesh).jaxpr.jaxpr,
    ):
        assert {kind for kind in dtypes(list(equations(program))) if '64' in kind} == {'int64'}


def test_fp32_converts_nothing_as_large_as_an_activation():
    smallest = BATCH * (SIZE // 8) ** 2 * 16  # Elements of the smallest activation.
    converted = [
        described(e.invars[0]) for e in operations('convert_element_type', dtype='float32')
    ]
    # Vectors are sums of gradients.
    large = {(a.shape, str(a.dtype)) for a in converted if a.size >= smallest and a.ndim > 1}
    # The images, once.
    assert large == {((BATCH, SIZE, SIZE, 3), 'uint8')}


def test_no_activation_is_transposed():
    moved = [described(e.invars[0]).shape for e in operations('transpose', dtype='float32')]
    # Those of kernels are; activations start with BATCH.
    assert not [shape for shape in moved if len(shape) == 4 and shape[0] == BATCH]


def test_batch_norm_reads_activations_twice_forward_and_twice_backward():
    layer, x = BatchNorm(4), jnp.zeros((8, 6, 6, 16))
    variables = layer.init(jax.random.key(0), x, False)

    def total(params, x):
        y, _ = layer.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
        return (y * y).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(variables['params'], x).jaxpr
    sums = [e for e in equations(jaxpr) if e.primitive.name == 'reduce_sum']
    whole = [e for e in sums if described(e.invars[0]).size == x.size]
    # This test's own sum; mean and variance; their gradients.
    assert len(whole) == 1 + 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize('micro_batch', [BATCH, SPAN])
def test_the_state_is_updated_in_place(micro_batch):
    model, *_ = step = parts(micro_batch_size=micro_batch)
    state = jax.tree.leaves(train_lib.abstract_state(model))
    memory = compilation.trace_train(*step).lower().compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in state)


@pytest.mark.slow
def test_resnet50_takes_three_forward_passes_of_operations():
    step = parts(
        ImageClassification,
        num_classes=1000,
        model='resnet50',
        image_size=224,
        global_batch_size=2,
        micro_batch_size=2,
        bn_span=2,
    )
    stem = 2 * 112 * 112 * 7 * 7 * 3 * 64
    forward = forward_operations()
    assert forward == pytest.approx(8.2e9, rel=0.01)
    # Batch normalisation, ReLU and the update are the rest; XLA counts padded taps as no work.
    costs = compilation.trace_train(*step).lower().cost_analysis()
    assert costs is not None
    assert costs['flops'] / 2 == pytest.approx(3 * forward - stem, rel=0.05)


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


def imported_by(*command) -> set[str]:
    """The modules that Python imports when it runs this."""
    done = run('-X', 'importtime', *command)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r'^import time:.*\| +(\S+)$', done.stderr, re.M))


class Counted(TinyBottleneck):
    """Notes every time that its variables are traced."""

    traced: ClassVar[list[bool]] = []

    def init(self, key):
        self.traced.append(True)
        return super().init(key)


def test_a_start_traces_a_tasks_variables_once():
    """Whether it asks for their shapes, their split, the evaluation or the variables themselves."""
    model, size, mesh = parts(Counted)
    check_split(model.task, mesh.size)
    compilation.trace_train(model, size, mesh)
    compilation.trace_evaluate(model.task, size, mesh)
    compilation.initial_state(1, model, mesh)
    assert Counted.traced == [True]


def test_a_start_without_the_garbage_collector_gives_it_back_even_if_it_fails():
    during = []

    @compilation.without_garbage_collector()
    def fails():
        during.append(gc.isenabled())
        raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert during == [False]
    assert gc.isenabled()


def test_help_needs_no_jax():
    imported = imported_by('main.py', '--help')
    assert 'settings.hyperparameters' in imported
    assert not imported & {'jax', 'flax', 'optax', 'orbax', 'grain'}


def test_the_loop_imports_nothing_that_it_does_not_use():
    imported = imported_by('-m', 'training.train_loop')
    assert 'train_lib' in imported
    assert not imported & {'torch', 'tensorflow', 'sklearn', 'matplotlib', 'pandas'}


TINY = ('--config=configs/digits.py', '--model=resnet_digits', '--image_size=8', '--classes=10')


@pytest.mark.slow
def test_train_step_benchmark_runs(tmp_path, digits_dir):
    results = tmp_path / 'results.jsonl'
    peer = ()
    if importlib.util.find_spec('torch'):
        peer = (f'--peer_python={sys.executable}', '--peer_compile=none')
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


@pytest.mark.slow
def test_llama_step_benchmark_runs():
    peer = ()
    if importlib.util.find_spec('transformers'):
        peer = (f'--peer_python={sys.executable}',)
    done = run('speed/llama_step.py', '--rounds=1', '--steps=1', '--accumulation=2', *peer)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith('| ours | ')]
    assert not peer or lines[-1].startswith('| best | ')


@pytest.mark.slow
def test_fp32_check_runs():
    done = run('speed/fp32_check.py', '--batch=2', '--image_size=32')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('relative error') == 2


@pytest.mark.slow
def test_a_profile_is_written(tmp_path, digits_dir):
    done = run(
        'main.py',
        f'--workdir={share_programs(tmp_path) / "run"}',
        f'--config.data_dir={digits_dir}',
        '--config.max_epochs=1',
        '--config.eval_every_epochs=1',
        '--profile=2:4',
    )
    assert done.returncode in (0, 1), done.stderr
    written = list((tmp_path / 'run' / 'profile').glob('plugins/profile/*/*'))
    assert {path.name.split('.', 1)[1] for path in written} >= {'trace.json.gz', 'xplane.pb'}
