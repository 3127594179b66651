# SPDX-License-Identifier: Apache-2.0
"""What speed/llama_hlo.py counts in a program; a compiler for GPUs is not at hand."""

import re

import pytest

from speed.llama_hlo import Program

SMALL = """HloModule step

%change (p0: f32[3,100,4], p1: f32[100,4], p2: s32[]) -> f32[3,100,4] {
  %p0 = f32[3,100,4]{2,1,0} parameter(0)
  %p1 = f32[100,4]{1,0} parameter(1)
  %one = f32[1,100,4]{2,1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  ROOT %changed = f32[3,100,4]{2,1,0} dynamic-update-slice(%p0, %one, %p2, %p2, %p2)
}

%pick (q0: f32[3,100,4], q1: s32[]) -> f32[1,100,4] {
  %q0 = f32[3,100,4]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %picked = f32[1,100,4]{2,1,0} dynamic-slice(%q0, %q1, %q1, %q1), dynamic_slice_sizes={1,100,4}
}

%body (t: (s32[], bf16[8,10], f32[3,100,4])) -> (s32[], bf16[8,10], f32[3,100,4]) {
  %t = (s32[], bf16[8,10]{1,0}, f32[3,100,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %part = bf16[8,10]{1,0} get-tuple-element(%t), index=1
  %all = f32[3,100,4]{2,1,0} get-tuple-element(%t), index=2
  %taken = ((f32[3,100,4]{2,1,0}, s32[]), f32[1,100,4]{2,1,0}, u32[]) fusion-start(%all, %i), kind=kLoop, calls=%pick
  %there = f32[1,100,4]{2,1,0} fusion-done(%taken)
  %begun = ((bf16[8,10]{1,0}), bf16[16,10]{1,0}) all-gather-start(%part), dimensions={0}
  %whole = bf16[16,10]{1,0} all-gather-done(%begun)
  %product = (f32[100,4]{1,0}, s8[64]{0}) custom-call(%whole, %whole), custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}
  %rows = f32[100,4]{1,0} get-tuple-element(%product), index=0
  %changed = f32[3,100,4]{2,1,0} fusion(%all, %rows, %i), kind=kLoop, calls=%change
  ROOT %r = (s32[], bf16[8,10]{1,0}, f32[3,100,4]{2,1,0}) tuple(%i, %part, %changed)
}

ENTRY %main (x: (s32[], bf16[8,10], f32[3,100,4])) -> s64[6] {
  %x = (s32[], bf16[8,10]{1,0}, f32[3,100,4]{2,1,0}) parameter(0)
  %loop = (s32[], bf16[8,10]{1,0}, f32[3,100,4]{2,1,0}) while(%x), condition=%done, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %sums = s64[12]{0} get-tuple-element(%loop), index=0
  ROOT %own = s64[6]{0} reduce-scatter(%sums), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


@pytest.fixture
def work():
    return Program(SMALL, devices=2, attention=1000).work()


def test_products_are_counted_as_often_as_the_loop_turns(work):
    assert work.operations == 3 * 2 * 16 * (100 * 4)


def test_what_is_received_is_what_others_have(work):
    gathered, summed = 8 * 10 * 2, 12 * 8 / 2
    assert work.received == 3 * gathered + summed


def test_of_what_is_changed_in_part_the_part_is_counted(work):
    product = 16 * 10 * 2 + 100 * 4 * 4  # Without scratch memory.
    change = pick = 2 * 100 * 4 * 4 + 4
    assert work.moved == 3 * (product + change + pick)


def test_attention_is_two_products_forward_and_five_backward():
    kernels = ('__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward')
    counted = [
        Program(re.sub(r'__cublas\$lt\$matmul', each, SMALL), 2, attention=1000).work()
        for each in kernels
    ]
    assert [work.operations for work in counted] == [3 * 2000, 3 * 5000]


@pytest.mark.parametrize('op', ['call', 'conditional'])
def test_what_would_be_left_out_is_an_error(op):
    text = SMALL.replace('fusion(%all', f'{op}(%all')
    with pytest.raises(ValueError, match=f'the work of this {op} would be left out: changed'):
        Program(text, 2, attention=1000).work()
