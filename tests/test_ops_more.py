"""The ops of the later families, against their layouts written in numpy: whole, by slabs, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mla_tools.errors import MlaToolsError
from mla_tools.ops import (
    AddPadding,
    ConcatRows,
    CutRows,
    DropPadding,
    Indices,
    Op,
    StackRows,
    UnstackRows,
)
from mla_tools.spec import DType, Spec

Arrays = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """An op, its inputs, its outputs as numpy makes them, and whether rows stay rows.

    `least`: the elements of what cannot be cut.
    """

    op: Op
    inputs: Arrays
    outputs: Arrays
    keeps: bool
    least: int


def numbered(*shapes: tuple[int, ...]) -> Arrays:
    """Return arrays in which no two numbers are equal, and none is zero."""
    starts = np.cumsum([1, *map(prod, shapes)])
    return [
        np.arange(start, start + prod(shape), dtype=np.float32).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


small = st.integers(2, 5)
lengths = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
inner = st.lists(small, min_size=1, max_size=2).map(tuple)


@st.composite
def concat(draw: st.DrawFn) -> Case:
    parts, rest = draw(lengths), draw(inner)
    arrays = numbered(*((n, *rest) for n in parts))
    return Case(ConcatRows(parts), arrays, [np.concatenate(arrays)], True, prod(rest))


@st.composite
def concat_swapped(draw: st.DrawFn) -> Case:
    parts, a, b = draw(lengths), draw(small), draw(small)
    arrays = numbered(*((n, a, b) for n in parts))
    whole = np.concatenate([np.moveaxis(array, -1, -2) for array in arrays])
    return Case(ConcatRows(parts, swap=True), arrays, [whole], False, a * b)


@st.composite
def stack_rows(draw: st.DrawFn) -> Case:
    count, rows, width = draw(small), draw(small), draw(small)
    (whole,) = numbered((count * rows, width))
    blocks = [whole[k * rows : (k + 1) * rows] for k in range(count)]
    return Case(StackRows(rows), [whole], [np.stack(blocks)], True, width)


@st.composite
def drop_padding(draw: st.DrawFn) -> Case:
    length, zeros = draw(small), draw(st.integers(1, 4))
    shape = (*draw(st.lists(small, max_size=2)), length)
    (array,) = numbered(shape)
    padded = np.zeros((*shape[:-1], length + zeros), np.float32)
    padded[..., :length] = array
    return Case(DropPadding(length, length + zeros), [padded], [array], False, length + zeros)


THERE = st.one_of(concat(), concat_swapped(), stack_rows(), drop_padding())
BACK = THERE.map(lambda case: replace(case, op=case.op.inverse(), inputs=case.outputs, outputs=case.inputs))
CASES = st.one_of(THERE, BACK)


def apply(op: Op, arrays: Arrays) -> Arrays:
    return [np.array(array) for array in op.apply([mx.array(array) for array in arrays])]


def specs(arrays: Arrays, dtype: DType = DType.F32) -> list[Spec]:
    return [Spec(array.shape, dtype) for array in arrays]


def equal(left: Arrays, right: Arrays) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


@given(CASES)
def test_apply_gives_the_layout_and_the_inverse_the_inputs(case: Case) -> None:
    assert equal(apply(case.op, case.inputs), case.outputs)
    assert equal(apply(case.op.inverse(), case.outputs), case.inputs)
    assert case.op.inverse().inverse() == case.op


@given(CASES, st.sampled_from(list(DType)))
def test_infer_tells_the_specs(case: Case, dtype: DType) -> None:
    assert list(case.op.infer(specs(case.inputs, dtype))) == specs(case.outputs, dtype)


@given(CASES, st.sampled_from([1, 3, 7, 20, 51, 1 << 40]))
def test_slabs_write_every_row_once_and_the_bits_of_the_whole(case: Case, limit: int) -> None:
    flat = [array.reshape(-1, array.shape[-1]) for array in case.inputs]
    made = [
        np.full((array.size // array.shape[-1], array.shape[-1]), -1, np.float32) for array in case.outputs
    ]
    times = [np.zeros(len(array), int) for array in made]
    for slab in case.op.slabs(specs(case.inputs), limit):
        read = [flat[block.index][block.start : block.stop].reshape(block.shape) for block in slab.reads]
        assert sum(array.size for array in read) <= max(limit, case.least)
        for block, result in zip(slab.writes, apply(case.op, read), strict=True):
            assert result.shape == block.shape
            made[block.index][block.start : block.stop] = result.reshape(block.stop - block.start, -1)
            times[block.index][block.start : block.stop] += 1
    assert all((count == 1).all() for count in times)
    assert equal(
        [array.reshape(out.shape) for array, out in zip(made, case.outputs, strict=True)], case.outputs
    )


@given(CASES)
def test_the_last_axis_is_kept_exactly_where_output_rows_are_input_rows(case: Case) -> None:
    rows = {row.tobytes() for array in case.inputs for row in array.reshape(-1, array.shape[-1])}
    for output, array in enumerate(case.outputs):
        moved = all(row.tobytes() in rows for row in array.reshape(-1, array.shape[-1]))
        assert case.op.keeps_last_axis(output) == case.keeps == moved


@given(st.integers(1, 300), st.data())
def test_indices_are_held_in_another_dtype(below: int, data: st.DataObject) -> None:
    shape = data.draw(inner)
    numbers = data.draw(st.lists(st.integers(0, below - 1), min_size=prod(shape), max_size=prod(shape)))
    array = np.array(numbers, np.int64).reshape(shape)
    op = Indices(below)
    (made,) = op.apply([mx.array(array)])
    assert made.dtype == mx.int32
    assert np.array_equal(np.array(made), array)
    assert op.infer([Spec(shape, DType.I64)]) == (Spec(shape, DType.I32),)
    (back,) = op.inverse().apply([made])
    assert back.dtype == mx.int64
    assert np.array_equal(np.array(back), array)
    assert op.inverse().inverse() == op


@pytest.mark.parametrize("number", [8, -1, 2**32 + 3, -(2**32), 2.5])
def test_an_index_to_nowhere_is_refused(number: float) -> None:
    array = mx.array([[0, 7], [number, 3]], mx.float32 if number == 2.5 else mx.int64)
    with pytest.raises(MlaToolsError, match=rf"holds {number}, .* whole and from 0 to 7"):
        Indices(8).apply([array])


PACKED: list[tuple[Op, list[tuple[int, ...]]]] = [
    (ConcatRows((6, 2, 4)), [(6, 64), (2, 64), (4, 64)]),
    (CutRows((6, 2, 4)), [(12, 64)]),
    (StackRows(3), [(6, 64)]),
    (UnstackRows(3), [(2, 3, 64)]),
]


@pytest.mark.parametrize(
    ("op", "shapes"), [pytest.param(*case, id=type(case[0]).__name__) for case in PACKED]
)
def test_packed_rows_move_with_their_bits(op: Op, shapes: list[tuple[int, ...]]) -> None:
    dense = [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]
    packed = [mx.quantize(array, group_size=32, bits=4) for array in dense]
    for output, array in enumerate(op.apply(dense)):
        for part, wanted in enumerate(mx.quantize(array, group_size=32, bits=4)):
            moved = op.apply([parts[part] for parts in packed])[output]
            assert mx.array_equal(moved, wanted).item()


REFUSED: list[tuple[Op, list[tuple[int, ...]], str]] = [
    (ConcatRows((2, 3)), [(2, 4), (2, 4)], "are not parts"),
    (ConcatRows((2, 3)), [(2, 4), (3, 5)], "are not parts"),
    (ConcatRows((2, 3)), [(2,), (3,)], "are not parts"),
    (CutRows((2, 3)), [(6, 4)], "has no parts"),
    (StackRows(3), [(7, 4)], "whole number of blocks"),
    (StackRows(3), [(6,)], "whole number of blocks"),
    (UnstackRows(3), [(2, 4, 5)], "has no blocks"),
    (DropPadding(3, 5), [(6,)], "is not padded"),
    (AddPadding(3, 5), [(5,)], "cannot be padded"),
]


@pytest.mark.parametrize(("op", "shapes", "text"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(op: Op, shapes: list[tuple[int, ...]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        op.infer([Spec(shape, DType.BF16) for shape in shapes])


@pytest.mark.parametrize("make", [lambda n: ConcatRows((n, 2)), StackRows, lambda n: DropPadding(n, 9)])
def test_ops_are_values(make: Callable[[int], Op]) -> None:
    assert make(3) == make(3)
    assert len({make(3), make(3).inverse().inverse(), make(4)}) == 2
