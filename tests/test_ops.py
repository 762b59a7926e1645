"""Every op against its layout written in numpy: whole, by slabs, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import mul

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mla_tools import ops
from mla_tools.ops import MergeKvB, Op, Same, SplitKvB, Stack, SwapLastAxes, Unstack
from mla_tools.spec import DType, Spec

Arrays = list[NDArray[np.float32]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """An op, the shapes of its inputs, and its layout as numpy statements."""

    op: Op
    shapes: tuple[Shape, ...]
    layout: Callable[[Arrays], Arrays]
    keeps: tuple[bool, ...]


def split_layout(heads: int, nope: int, value: int, rank: int) -> Callable[[Arrays], Arrays]:
    def split(arrays: Arrays) -> Arrays:
        (fused,) = arrays
        embed_q = np.empty((heads, rank, nope), np.float32)
        unembed_out = np.empty((heads, value, rank), np.float32)
        for h in range(heads):
            first = h * (nope + value)
            for k in range(nope):
                embed_q[h, :, k] = fused[first + k]
            for k in range(value):
                unembed_out[h, k] = fused[first + nope + k]
        return [embed_q, unembed_out]

    return split


def merge_layout(heads: int, nope: int, value: int, rank: int) -> Callable[[Arrays], Arrays]:
    def merge(arrays: Arrays) -> Arrays:
        embed_q, unembed_out = arrays
        rows = []
        for h in range(heads):
            rows += [embed_q[h, :, k] for k in range(nope)]
            rows += [unembed_out[h, k] for k in range(value)]
        return [np.stack(rows)]

    return merge


small = st.integers(2, 5)


@st.composite
def same(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return Case(Same(), (shape,), lambda arrays: arrays, (True,))


@st.composite
def stack(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(small, min_size=1, max_size=3)))
    count = draw(st.integers(1, 5))
    return Case(Stack(), (shape,) * count, lambda arrays: [np.stack(arrays)], (True,))


@st.composite
def unstack(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(small, min_size=2, max_size=3)))
    return Case(Unstack(), (shape,), lambda arrays: [*arrays[0]], (True,) * shape[0])


@st.composite
def split(draw: st.DrawFn) -> Case:
    h, n, v, r = (draw(small) for _ in range(4))
    return Case(SplitKvB(n, v), ((h * (n + v), r),), split_layout(h, n, v, r), (False, True))


@st.composite
def merge(draw: st.DrawFn) -> Case:
    h, n, v, r = (draw(small) for _ in range(4))
    return Case(MergeKvB(n, v), ((h, r, n), (h, v, r)), merge_layout(h, n, v, r), (False,))


@st.composite
def swap(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(small, min_size=2, max_size=4)))
    return Case(SwapLastAxes(), (shape,), lambda arrays: [np.moveaxis(arrays[0], -1, -2)], (False,))


KINDS = {
    "same": same(),
    "stack": stack(),
    "unstack": unstack(),
    "split": split(),
    "merge": merge(),
    "swap": swap(),
}
CASES = st.one_of(*KINDS.values())


def numbered(shapes: Sequence[Shape]) -> Arrays:
    """Return arrays in which no two numbers are equal."""
    arrays, start = [], 0
    for shape in shapes:
        size = reduce(mul, shape, 1)
        arrays.append(np.arange(start, start + size, dtype=np.float32).reshape(shape))
        start += size
    return arrays


def apply(op: Op, arrays: Arrays) -> Arrays:
    return [np.array(array) for array in op.apply([mx.array(array) for array in arrays])]


def specs(arrays: Arrays) -> list[Spec]:
    return [Spec(array.shape, DType.F32) for array in arrays]


def equal(left: Arrays, right: Arrays) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(left, right, strict=True)
    )


@given(CASES)
def test_apply_gives_the_layout(case: Case) -> None:
    arrays = numbered(case.shapes)
    assert equal(apply(case.op, arrays), case.layout(arrays))


@given(CASES, st.sampled_from(list(DType)))
def test_infer_tells_the_specs_of_apply(case: Case, dtype: DType) -> None:
    arrays = numbered(case.shapes)
    inferred = case.op.infer([spec._replace(dtype=dtype) for spec in specs(arrays)])
    assert list(inferred) == [Spec(array.shape, dtype) for array in apply(case.op, arrays)]


@given(CASES)
def test_inverse_gives_back_the_inputs(case: Case) -> None:
    arrays = numbered(case.shapes)
    there = apply(case.op, arrays)
    assert equal(apply(case.op.inverse(), there), arrays)
    assert case.op.inverse().inverse() == case.op
    assert list(case.op.inverse().infer(specs(there))) == specs(arrays)


@given(CASES, st.sampled_from([1, 3, 7, 20, 51, 1 << 40]))
def test_slabs_write_every_row_once_and_the_bits_of_the_whole(case: Case, limit: int) -> None:
    arrays = numbered(case.shapes)
    whole = apply(case.op, arrays)
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    made = [np.full((array.size // array.shape[-1], array.shape[-1]), -1, np.float32) for array in whole]
    times = [np.zeros(len(array), int) for array in made]
    for slab in case.op.slabs(specs(arrays), limit):
        read = [flat[block.index][block.start : block.stop].reshape(block.shape) for block in slab.reads]
        for block, result in zip(slab.writes, apply(case.op, read), strict=True):
            assert result.shape == block.shape
            rows = slice(block.start, block.stop)
            made[block.index][rows] = result.reshape(block.stop - block.start, -1)
            times[block.index][rows] += 1
    assert all((count == 1).all() for count in times)
    assert equal([array.reshape(out.shape) for array, out in zip(made, whole, strict=True)], whole)


@given(CASES, st.integers(1, 60))
def test_slabs_are_no_larger_than_the_limit_where_they_can_be_cut(case: Case, limit: int) -> None:
    # What cannot be cut: a row; of the ops that transpose, a matrix; of kv_b, a head.
    least = {
        Same: lambda: case.shapes[0][-1],
        Stack: lambda: case.shapes[0][-1],
        Unstack: lambda: case.shapes[0][-1],
        SwapLastAxes: lambda: case.shapes[0][-1] * case.shapes[0][-2],
        SplitKvB: lambda: (case.op.nope + case.op.value) * case.shapes[0][1],  # type: ignore[attr-defined]
        MergeKvB: lambda: (case.op.nope + case.op.value) * case.shapes[0][1],  # type: ignore[attr-defined]
    }[type(case.op)]()
    arrays = numbered(case.shapes)
    for slab in case.op.slabs(specs(arrays), limit):
        for blocks in (slab.reads, slab.writes):
            assert sum(reduce(mul, block.shape) for block in blocks) <= max(limit, least)


@given(CASES)
def test_the_last_axis_is_kept_exactly_where_output_rows_are_input_rows(case: Case) -> None:
    arrays = numbered(case.shapes)
    rows = {row.tobytes() for array in arrays for row in array.reshape(-1, array.shape[-1])}
    for output, array in enumerate(apply(case.op, arrays)):
        moved = all(row.tobytes() in rows for row in array.reshape(-1, array.shape[-1]))
        assert case.op.keeps_last_axis(output) == case.keeps[output] == moved


PACKED: list[tuple[Op, tuple[Shape, ...], dict[int, int]]] = [
    (Same(), ((6, 64),), {0: 0}),
    (Stack(), ((6, 64),) * 3, {0: 0}),
    (Unstack(), ((3, 6, 64),), {0: 0, 1: 1, 2: 2}),
    (SplitKvB(3, 2), ((4 * 5, 64),), {1: 1}),
]


@pytest.mark.parametrize(
    ("op", "shapes", "outputs"), [pytest.param(*case, id=type(case[0]).__name__) for case in PACKED]
)
def test_packed_rows_move_with_their_bits(op: Op, shapes: tuple[Shape, ...], outputs: dict[int, int]) -> None:
    dense = [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]
    packed = [mx.quantize(array, group_size=32, bits=4) for array in dense]
    for output in outputs:
        assert op.keeps_last_axis(output)
        wanted = mx.quantize(op.apply(dense)[output], group_size=32, bits=4)
        for part in range(3):
            moved = op.apply([parts[part] for parts in packed])[output]
            assert moved.dtype == wanted[part].dtype
            assert mx.array_equal(moved, wanted[part]).item()


def test_small_tensors_that_are_stacked_share_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(limit: int) -> list[int]:
        return [len(slab.reads) for slab in Stack().slabs([Spec((4, 8), DType.BF16)] * 10, limit)]

    assert counts(100) == [3, 3, 3, 1]
    assert counts(40) == [1] * 10
    assert counts(1 << 40) == [10]
    monkeypatch.setattr(ops, "_TOGETHER", 64)
    assert counts(1 << 40) == [2] * 5


@settings(max_examples=20)
@given(st.integers(200, 900), st.integers(130, 400))
def test_long_runs_are_cut_at_multiples_of_128_rows(rows: int, step: int) -> None:
    for op in (Same(), Stack()):
        slabs = list(op.slabs([Spec((rows, 2), DType.BF16)], 2 * step))
        assert all(slab.reads[0].start % 128 == 0 for slab in slabs)
        assert slabs[-1].reads[0].stop == rows


REFUSED = [
    pytest.param(Stack(), [(2, 3), (3, 2)], "different shapes", id="stack"),
    pytest.param(SplitKvB(3, 2), [(11, 4)], "whole number of heads", id="split_rest"),
    pytest.param(SplitKvB(3, 2), [(10, 4, 1)], "whole number of heads", id="split_axes"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 2), (4, 2, 8)], "not the halves", id="merge_nope"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 3), (5, 2, 8)], "not the halves", id="merge_heads"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 3), (4, 2, 7)], "not the halves", id="merge_rank"),
]


@pytest.mark.parametrize(("op", "shapes", "text"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(op: Op, shapes: list[Shape], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        op.infer([Spec(shape, DType.BF16) for shape in shapes])


@pytest.mark.parametrize("op", [Same(), Stack(), Unstack(), SplitKvB(3, 2), MergeKvB(3, 2), SwapLastAxes()])
def test_ops_are_values(op: Op) -> None:
    assert op == replace(op)  # type: ignore[type-var]
    assert len({op, op.inverse().inverse()}) == 1
    assert SplitKvB(3, 2) != SplitKvB(2, 3)


def test_rows_that_hold_nothing_are_no_work() -> None:
    assert list(Same().slabs([Spec((1 << 40, 1 << 20, 0), DType.BF16)], 8 << 20)) == []
