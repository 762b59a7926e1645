"""SplitRows, Copies and their inverses against numpy: whole, by slabs, and with packed rows."""

from __future__ import annotations

from math import prod

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mla_tools.ops import Copies, JoinRows, Op, SplitRows, TakeFirst
from mla_tools.spec import DType, Spec

Array = NDArray[np.float32]
Case = tuple[Op, list[Array], list[Array]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """An op, its inputs, and its outputs made in numpy."""
    parts = draw(st.integers(1, 4))
    head = draw(st.lists(st.integers(1, 3), max_size=2))
    rows, width = draw(st.integers(1, 300)), draw(st.integers(1, 3))
    shape = (*head, parts * rows, width)
    whole = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    pieces = [whole[..., n * rows : (n + 1) * rows, :] for n in range(parts)]
    found: list[Case] = [
        (SplitRows(parts), [whole], pieces),
        (JoinRows(parts), pieces, [whole]),
        (Copies(parts), [whole], [whole] * parts),
        (TakeFirst(parts), [whole] * parts, [whole]),
    ]
    return draw(st.sampled_from(found))


def specs(arrays: list[Array]) -> list[Spec]:
    return [Spec(array.shape, DType.F32) for array in arrays]


def apply(op: Op, arrays: list[Array]) -> list[Array]:
    return [np.array(array) for array in op.apply([mx.array(array) for array in arrays])]


@given(cases())
def test_the_whole(case: Case) -> None:
    op, inputs, outputs = case
    assert list(op.infer(specs(inputs))) == specs(outputs)
    for made, wanted in zip(apply(op, inputs), outputs, strict=True):
        assert np.array_equal(made, wanted)
    assert all(op.keeps_last_axis(output) for output in range(len(outputs)))


@given(cases())
def test_there_and_back(case: Case) -> None:
    op, inputs, outputs = case
    assert op.inverse().inverse() == op
    assert list(op.inverse().infer(specs(outputs))) == specs(inputs)
    for made, wanted in zip(apply(op.inverse(), outputs), inputs, strict=True):
        assert np.array_equal(made, wanted)


@given(cases(), st.sampled_from([1, 5, 64, 600, 1 << 40]))
def test_slabs_write_every_row_once_and_keep_to_the_limit(case: Case, limit: int) -> None:
    op, inputs, outputs = case
    flat = [array.reshape(-1, array.shape[-1]) for array in inputs]
    made = [np.full_like(array.reshape(-1, array.shape[-1]), -1) for array in outputs]
    times = [np.zeros(len(array), int) for array in made]
    for slab in op.slabs(specs(inputs), limit):
        reads = [flat[block.index][block.start : block.stop].reshape(block.shape) for block in slab.reads]
        # Less than one row of each part cannot be worked on.
        assert sum(read.size for read in reads) <= max(limit, len(reads) * flat[0].shape[1])
        for block, result in zip(slab.writes, apply(op, reads), strict=True):
            assert result.shape == block.shape
            made[block.index][block.start : block.stop] = result.reshape(-1, result.shape[-1])
            times[block.index][block.start : block.stop] += 1
    assert all((count == 1).all() for count in times)
    for array, wanted in zip(made, outputs, strict=True):
        assert np.array_equal(array.reshape(wanted.shape), wanted)


def test_long_runs_are_cut_at_multiples_of_128_rows() -> None:
    spec = Spec((3, 2000, 4), DType.BF16)
    starts = {slab.writes[0].start % 1000 % 128 for slab in SplitRows(2).slabs([spec], 2 * 300 * 4)}
    assert starts == {0}
    half = Spec((3, 1000, 4), DType.BF16)
    assert {slab.reads[0].start % 1000 % 128 for slab in JoinRows(2).slabs([half] * 2, 300 * 4)} == {0}


@pytest.mark.parametrize("op", [SplitRows(2), Copies(2)])
def test_packed_rows_move_with_their_bits(op: Op) -> None:
    dense = mx.random.normal((3, 6, 64), key=mx.random.key(0))
    packed = mx.quantize(dense, group_size=32, bits=4)
    for output, wanted in enumerate(op.apply([dense])):
        for part, bits in zip(packed, mx.quantize(wanted, group_size=32, bits=4), strict=True):
            assert mx.array_equal(op.apply([part])[output], bits).item()


@pytest.mark.parametrize(
    ("op", "shapes", "text"),
    [
        pytest.param(SplitRows(2), [(3, 7, 4)], "2 equal parts", id="odd_rows"),
        pytest.param(SplitRows(2), [(8,)], "2 equal parts", id="no_rows"),
        pytest.param(JoinRows(2), [(3, 4), (3, 5)], "not 2 equal parts", id="unlike_parts"),
        pytest.param(JoinRows(2), [(3, 4)], "not 2 equal parts", id="missing_part"),
        pytest.param(TakeFirst(2), [(3, 4), (4, 3)], "not 2 copies", id="unlike_copies"),
    ],
)
def test_what_does_not_fit_is_refused(op: Op, shapes: list[tuple[int, ...]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        op.infer([Spec(shape, DType.BF16) for shape in shapes])
