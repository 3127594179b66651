# SPDX-License-Identifier: Apache-2.0
"""What a device is made for is known of whole GPUs of some kinds."""

import pytest

from run_files import machine


@pytest.mark.parametrize(
    ('kind', 'dtype', 'tflops'),
    [
        ('Tesla V100-SXM2-16GB', 'float16', 125),
        ('Tesla V100-SXM2-16GB', 'bfloat16', None),
        ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312),
        ('NVIDIA H200', 'bfloat16', 989),
        ('NVIDIA H200', 'float32', 67),
        ('NVIDIA H200 MIG 1g.18gb', 'bfloat16', None),
        ('cpu', 'float32', None),
    ],
)
def test_peaks_are_those_of_data_sheets(kind, dtype, tflops):
    assert machine.peak(kind, dtype) == (tflops and tflops * 1e12)
