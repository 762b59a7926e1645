"""Every op against its layout written in numpy: whole, by slabs, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mla_tools import ops
from mla_tools.errors import MlaToolsError
from mla_tools.ops import (
    AddPadding,
    Block,
    Concat,
    Copies,
    DropPadding,
    Flatten,
    Indices,
    MergeKvB,
    Op,
    Same,
    Split,
    SplitKvB,
    Stack,
    SwapLastAxes,
    TakeFirst,
    Then,
    Unflatten,
    Unstack,
)
from mla_tools.spec import DType, Spec

Arrays = list[NDArray[np.float32]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """An op, its inputs, its outputs as numpy makes them, and whether their rows are rows of the inputs.

    `least`: the elements of what cannot be cut.
    """

    op: Op
    inputs: Arrays
    outputs: Arrays
    keeps: tuple[bool, ...]
    least: int

    def back(self) -> Case:
        """Return the case of the inverse."""
        keeps = (all(self.keeps),) * len(self.inputs)
        return replace(self, op=self.op.inverse(), inputs=self.outputs, outputs=self.inputs, keeps=keeps)


def numbered(*shapes: Shape) -> Arrays:
    """Return arrays in which no two numbers are equal, and none is zero."""
    starts = np.cumsum([1, *map(prod, shapes)])
    return [
        np.arange(start, start + prod(shape), dtype=np.float32).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


def swapped(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.moveaxis(array, -1, -2)


SWAP = SwapLastAxes()
small = st.integers(2, 5)
# Some are longer than the runs of 128 rows in which long ones are cut.
lengths = st.lists(st.integers(1, 5) | st.integers(120, 300), min_size=1, max_size=4).map(tuple)
pair = st.tuples(small, small)


@st.composite
def same(draw: st.DrawFn) -> Case:
    array, *_ = numbered(tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))))
    return Case(Same(), [array], [array], (True,), array.shape[-1])


@st.composite
def stack(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(small, min_size=1, max_size=3)))
    arrays = numbered(*[shape] * draw(st.integers(1, 5)))
    return Case(Stack(), arrays, [np.stack(arrays)], (True,), shape[-1])


@st.composite
def copies(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 4))
    arrays = numbered((draw(st.integers(1, 300)), draw(st.integers(1, 3))))
    return Case(Copies(count), arrays, arrays * count, (True,) * count, count * arrays[0].shape[-1])


@st.composite
def split(draw: st.DrawFn) -> Case:
    parts = draw(lengths)
    head, inner = draw(st.lists(small, max_size=2)), draw(st.lists(small, min_size=1, max_size=2))
    (whole,) = numbered((*head, sum(parts), *inner))
    axis = draw(st.sampled_from([len(head), -len(inner) - 1]))
    pieces = np.split(whole, np.cumsum(parts)[:-1], axis=len(head))
    return Case(Split(parts, axis), [whole], pieces, (True,) * len(parts), prod(inner))


@st.composite
def split_kv_b(draw: st.DrawFn) -> Case:
    h, n, v, r = (draw(small) for _ in range(4))
    (fused,) = numbered((h * (n + v), r))
    embed_q = np.empty((h, r, n), np.float32)
    unembed_out = np.empty((h, v, r), np.float32)
    for head in range(h):
        first = head * (n + v)
        for k in range(n):
            embed_q[head, :, k] = fused[first + k]
        for k in range(v):
            unembed_out[head, k] = fused[first + n + k]
    return Case(SplitKvB(n, v), [fused], [embed_q, unembed_out], (False, True), (n + v) * r)


@st.composite
def swap(draw: st.DrawFn) -> Case:
    (array,) = numbered(tuple(draw(st.lists(small, min_size=2, max_size=4))))
    op = draw(st.sampled_from([SWAP, Then(Same(), SWAP), Then(SWAP, Same())]))
    return Case(op, [array], [swapped(array)], (False,), prod(array.shape[-2:]))


@st.composite
def unflatten(draw: st.DrawFn) -> Case:
    count, rows, width = draw(small), draw(small | st.integers(120, 300)), draw(small)
    (whole,) = numbered((count * rows, width))
    blocks = [whole[k * rows : (k + 1) * rows] for k in range(count)]
    return Case(Unflatten(rows), [whole], [np.stack(blocks)], (True,), width)


@st.composite
def drop_padding(draw: st.DrawFn) -> Case:
    length, zeros = draw(small), draw(st.integers(1, 4))
    shape = (*draw(st.lists(small, max_size=2)), length)
    (array,) = numbered(shape)
    padded = np.zeros((*shape[:-1], length + zeros), np.float32)
    padded[..., :length] = array
    return Case(DropPadding(length, length + zeros), [padded], [array], (False,), length + zeros)


@st.composite
def concat_then_swap(draw: st.DrawFn) -> Case:
    # q, k and v convolutions, [c, 1, k]
    parts, (a, b) = draw(lengths), draw(pair)
    a = draw(st.sampled_from([1, a]))
    arrays = numbered(*((n, a, b) for n in parts))
    whole = swapped(np.concatenate(arrays))
    return Case(Then(Concat(parts), SWAP), arrays, [whole], (False,), a * b)


@st.composite
def swap_then_split(draw: st.DrawFn) -> Case:
    # fused experts that are stored as x @ w wants them, [e, i, 2*o]
    parts, e, i = draw(lengths), draw(small), draw(small)
    (whole,) = numbered((e, i, sum(parts)))
    pieces = np.split(swapped(whole), np.cumsum(parts)[:-1], axis=1)
    op = Then(SWAP, Split(parts, draw(st.sampled_from([1, -2]))))
    return Case(op, [whole], pieces, (False,) * len(parts), i * sum(parts))


@st.composite
def three_ops(draw: st.DrawFn) -> Case:
    parts, (a, b), zeros = draw(lengths), draw(pair), draw(st.integers(1, 4))
    arrays = numbered(*((n, a, b) for n in parts))
    padded = np.pad(swapped(np.concatenate(arrays)), [(0, 0), (0, 0), (0, zeros)])
    swap_and_pad = Then(SWAP, AddPadding(a, a + zeros))
    concat_and_swap = Then(Concat(parts), SWAP)
    either = [Then(Concat(parts), swap_and_pad), Then(concat_and_swap, AddPadding(a, a + zeros))]
    return Case(draw(st.sampled_from(either)), arrays, [padded], (False,), (a + zeros) * b)


THERE = st.one_of(
    same(),
    stack(),
    copies(),
    split(),
    split_kv_b(),
    swap(),
    unflatten(),
    drop_padding(),
    concat_then_swap(),
    swap_then_split(),
    three_ops(),
)
CASES = THERE | THERE.map(Case.back)
LIMITS = st.sampled_from([1, 3, 7, 20, 51, 600, 1 << 40])


def apply(op: Op, arrays: Arrays) -> Arrays:
    return [np.array(array) for array in op.apply([mx.array(array) for array in arrays])]


def specs(arrays: Arrays, dtype: DType = DType.F32) -> list[Spec]:
    return [Spec(array.shape, dtype) for array in arrays]


def equal(left: Arrays, right: Arrays) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def rows_of(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array.reshape(-1, array.shape[-1])


def slab_sizes(case: Case, limit: int) -> Iterator[tuple[int, int]]:
    """Yield how many elements each slab reads, and how many it writes."""

    def size(blocks: tuple[Block, ...]) -> int:
        return sum(prod(block.shape) for block in blocks)

    for slab in case.op.slabs(specs(case.inputs), limit):
        yield size(slab.reads), size(slab.writes)


@given(CASES)
def test_apply_gives_the_layout_and_the_inverse_the_inputs(case: Case) -> None:
    assert equal(apply(case.op, case.inputs), case.outputs)
    assert equal(apply(case.op.inverse(), case.outputs), case.inputs)
    assert case.op.inverse().inverse() == case.op


@given(CASES, st.sampled_from(list(DType)))
def test_infer_tells_the_specs(case: Case, dtype: DType) -> None:
    assert list(case.op.infer(specs(case.inputs, dtype))) == specs(case.outputs, dtype)


@given(CASES, LIMITS)
def test_slabs_write_every_row_once_and_the_bits_of_the_whole(case: Case, limit: int) -> None:
    flat = [rows_of(array) for array in case.inputs]
    made = [np.full_like(rows_of(array), -1) for array in case.outputs]
    times = [np.zeros(len(array), int) for array in made]
    for slab in case.op.slabs(specs(case.inputs), limit):
        read = [flat[block.index][block.start : block.stop].reshape(block.shape) for block in slab.reads]
        for block, result in zip(slab.writes, apply(case.op, read), strict=True):
            assert result.shape == block.shape
            made[block.index][block.start : block.stop] = result.reshape(block.stop - block.start, -1)
            times[block.index][block.start : block.stop] += 1
    assert all((count == 1).all() for count in times)
    assert equal(made, [rows_of(array) for array in case.outputs])


@given(CASES, LIMITS | st.integers(1, 60))
def test_slabs_are_no_larger_than_the_limit_where_they_can_be_cut(case: Case, limit: int) -> None:
    assert all(max(sizes) <= max(limit, case.least) for sizes in slab_sizes(case, limit))


@given(CASES, LIMITS)
def test_no_slab_is_larger_than_the_first(case: Case, limit: int) -> None:
    sizes = list(slab_sizes(case, limit))
    assert sizes[0] == tuple(map(max, zip(*sizes, strict=True)))


@given(CASES)
def test_the_last_axis_is_kept_exactly_where_output_rows_are_input_rows(case: Case) -> None:
    rows = {row.tobytes() for array in case.inputs for row in rows_of(array)}
    for output, array in enumerate(case.outputs):
        moved = all(row.tobytes() in rows for row in rows_of(array))
        assert case.op.keeps_last_axis(output) == case.keeps[output] == moved


PACKED: list[tuple[Op, list[Shape]]] = [
    (Same(), [(6, 64)]),
    (Stack(), [(6, 64)] * 3),
    (Unstack(), [(3, 6, 64)]),
    (Copies(2), [(6, 64)]),
    (TakeFirst(2), [(6, 64)] * 2),
    (Split((6, 2, 4)), [(12, 64)]),
    (Split((3, 3), axis=-2), [(2, 6, 64)]),
    (Concat((6, 2, 4)), [(6, 64), (2, 64), (4, 64)]),
    (Concat((3, 3), axis=-2), [(2, 3, 64)] * 2),
    (Unflatten(3), [(6, 64)]),
    (Flatten(3), [(2, 3, 64)]),
    (SplitKvB(3, 2), [(4 * 5, 64)]),
    (Then(Concat((4, 6), axis=-2), Split((3, 7), axis=-2)), [(2, 4, 64), (2, 6, 64)]),
]


@pytest.mark.parametrize(
    ("op", "shapes"), [pytest.param(*case, id=f"{case[0]}".replace(" ", "")) for case in PACKED]
)
def test_packed_rows_move_with_their_bits(op: Op, shapes: list[Shape]) -> None:
    dense = [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]
    packed = [mx.quantize(array, group_size=32, bits=4) for array in dense]
    kept = {output: array for output, array in enumerate(op.apply(dense)) if op.keeps_last_axis(output)}
    assert kept
    for output, array in kept.items():
        for part, wanted in enumerate(mx.quantize(array, group_size=32, bits=4)):
            moved = op.apply([parts[part] for parts in packed])[output]
            assert moved.dtype == wanted.dtype
            assert mx.array_equal(moved, wanted).item()


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
    spec = Spec((rows, 2), DType.BF16)
    for op, inputs in ((Same(), [spec]), (Stack(), [spec]), (Concat((rows, rows)), [spec] * 2)):
        slabs = list(op.slabs(inputs, 2 * step))
        assert all(slab.reads[0].start % 128 == 0 for slab in slabs)
        assert slabs[-1].reads[0].stop == rows
    fused = Spec((3, 2 * rows, 2), DType.BF16)
    for slab in Split((rows, rows), axis=-2).slabs([fused], 2 * step):
        assert slab.reads[0].start % rows % 128 == slab.writes[0].start % rows % 128 == 0


def test_rows_that_hold_nothing_are_no_work() -> None:
    assert list(Same().slabs([Spec((1 << 40, 1 << 20, 0), DType.BF16)], 8 << 20)) == []


@given(st.integers(1, 300), st.data())
def test_indices_are_held_in_another_dtype(below: int, data: st.DataObject) -> None:
    shape = data.draw(st.lists(small, min_size=1, max_size=2).map(tuple))
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


REFUSED = [
    pytest.param(Stack(), [(2, 3), (3, 2)], "different shapes", id="stack"),
    pytest.param(TakeFirst(2), [(3, 4), (4, 3)], "not 2 copies", id="unlike_copies"),
    pytest.param(TakeFirst(2), [(3, 4)], "not 2 copies", id="missing_copy"),
    pytest.param(Split((2, 3)), [(6, 4)], "has no parts", id="split_rest"),
    pytest.param(Split((2, 3)), [(5,)], "has no parts", id="split_last_axis"),
    pytest.param(Split((2, 3), axis=-1), [(4, 5)], "has no parts", id="split_last_axis_from_behind"),
    pytest.param(Split((2, 3), axis=-3), [(5, 4)], "has no parts", id="split_no_such_axis"),
    pytest.param(Split((2, 3), axis=2), [(5, 4)], "has no parts", id="split_no_such_axis_behind"),
    pytest.param(Concat((2, 3)), [(2, 4), (2, 4)], "are not parts", id="concat_lengths"),
    pytest.param(Concat((2, 3)), [(2, 4), (3, 5)], "are not parts", id="concat_widths"),
    pytest.param(Concat((2, 3), axis=-2), [(1, 2, 4), (2, 3, 4)], "are not parts", id="concat_heads"),
    pytest.param(Concat((2, 3)), [(2, 4)], "are not parts", id="concat_missing"),
    pytest.param(Concat((2, 3)), [(2,), (3,)], "are not parts", id="concat_last_axis"),
    pytest.param(SplitKvB(3, 2), [(11, 4)], "does not divide into heads", id="split_kv_b_rest"),
    pytest.param(SplitKvB(3, 2), [(10, 4, 1)], "does not divide into heads", id="split_kv_b_axes"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 2), (4, 2, 8)], "not the halves", id="merge_nope"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 3), (5, 2, 8)], "not the halves", id="merge_heads"),
    pytest.param(MergeKvB(3, 2), [(4, 8, 3), (4, 2, 7)], "not the halves", id="merge_rank"),
    pytest.param(Unflatten(3), [(7, 4)], "does not divide into blocks", id="unflatten_rest"),
    pytest.param(Unflatten(3), [(6,)], "does not divide into blocks", id="unflatten_axes"),
    pytest.param(Flatten(3), [(2, 4, 5)], "has no blocks", id="flatten"),
    pytest.param(DropPadding(3, 5), [(6,)], "is not padded", id="drop_padding"),
    pytest.param(AddPadding(3, 5), [(5,)], "cannot be padded", id="add_padding"),
    # An expert may be cut into pieces, which cannot be transposed.
    pytest.param(Then(Stack(), SWAP), [(4, 8)] * 3, "Stack and then Swap.* block by block", id="pieces"),
    pytest.param(Then(SWAP, Unstack()), [(3, 8, 4)], "block by block", id="pieces_back"),
    pytest.param(Then(SWAP, Unstack()), [(4, 4, 4)], "block by block", id="axes_of_one_length"),
    pytest.param(Then(SWAP, SplitKvB(3, 2)), [(4, 10)], "block by block", id="whole_matrix_only"),
    pytest.param(Then(Split((2, 3)), Concat((2, 3))), [(5, 4)], "Split makes 2 tensors", id="two_between"),
    pytest.param(Then(Concat((2, 3)), Split((4, 2))), [(2, 4), (3, 4)], "has no parts", id="second_op"),
]


@pytest.mark.parametrize(("op", "shapes", "text"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(op: Op, shapes: list[Shape], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        op.infer([Spec(shape, DType.BF16) for shape in shapes])


VALUES = [
    (Same(), Stack()),
    (Unstack(), Stack()),
    (Copies(2), Copies(3)),
    (Split((3, 2)), Split((3, 2), axis=-2)),
    (Concat((3, 2)), Concat((2, 3))),
    (SplitKvB(3, 2), SplitKvB(2, 3)),
    (MergeKvB(3, 2), SplitKvB(3, 2)),
    (SwapLastAxes(), Same()),
    (Unflatten(3), Flatten(3)),
    (DropPadding(3, 9), DropPadding(4, 9)),
    (Then(Concat((3, 2)), SWAP), Then(SWAP, Concat((3, 2)))),
]


@pytest.mark.parametrize(("op", "other"), VALUES)
def test_ops_are_values(op: Op, other: Op) -> None:
    assert op == replace(op)  # type: ignore[type-var]
    assert op != other
    assert len({op, op.inverse().inverse(), other}) == 2
