"""Dense: one stored tensor, in the dtypes that weights are computed in."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mla_tools.codecs.codec import Module, part_name
from mla_tools.codecs.dense import Dense, claim
from mla_tools.spec import DType, Spec

CLAIMED = {DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32}

FLOATS = pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=lambda d: d.name)


@pytest.mark.parametrize("dtype", DType, ids=lambda d: d.name)
def test_claims_what_can_be_computed_with(dtype: DType) -> None:
    spec = Spec((3, 2), dtype)
    claims = claim(Module({"weight": spec}, 2, {}))
    if dtype not in CLAIMED:
        assert claims == []
        return
    (found,) = claims
    assert (found.leaf, found.spec, found.codec) == ("weight", spec, Dense(dtype))
    assert found.parts == {"weight": "weight"}


def test_every_leaf_is_a_tensor_of_its_own() -> None:
    leaves = {"weight": Spec((3, 2), DType.BF16), "bias": Spec((3,), DType.F32), "q": Spec((), DType.F16)}
    assert {found.leaf: found.spec for found in claim(Module(leaves, None, {}))} == leaves


@FLOATS
def test_word_parts_and_rows(dtype: DType) -> None:
    codec = Dense(dtype)
    assert codec.name == dtype.name.lower()
    assert codec.quantized is False
    assert codec.encoded(Spec((4, 5), DType.F32)) == {"weight": Spec((4, 5), dtype)}
    assert codec.cut(2, 7) == {"weight": (2, 7)}


@FLOATS
@pytest.mark.parametrize("target", [DType.F32, DType.F16, DType.BF16], ids=lambda d: d.name)
def test_decode_rounds_once_and_encode_gives_it_back(dtype: DType, target: DType) -> None:
    array = mx.random.normal((5, 7), key=mx.random.key(3)).astype(getattr(mx, dtype.mlx))
    decoded = Dense(dtype).decode({"weight": array}, 0, array.shape[0], target)
    assert decoded.dtype == getattr(mx, target.mlx)
    assert mx.array_equal(decoded, array.astype(decoded.dtype)).item()
    (again,) = Dense(target).encode(array).values()
    assert again.dtype == decoded.dtype
    assert mx.array_equal(again, decoded).item()


def test_whole_numbers_are_left_to_the_op_that_narrows_them() -> None:
    array = mx.array([[0, 2**40]], mx.int64)
    decoded = Dense(DType.I64).decode({"weight": array}, 0, 1, DType.I32)
    assert decoded.dtype == mx.int64
    assert mx.array_equal(decoded, array).item()
    (encoded,) = Dense(DType.I32).encode(mx.array([[0, 7]], mx.int64)).values()
    assert encoded.dtype == mx.int32


@FLOATS
def test_nothing_happens_to_the_bits_of_strange_numbers(dtype: DType) -> None:
    numbers = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 6e-8]
    array = mx.array(numbers, dtype=getattr(mx, dtype.mlx))
    decoded = Dense(dtype).decode({"weight": array}, 0, array.shape[0], dtype)
    assert np.array_equal(np.array(decoded.view(mx.uint8)), np.array(array.view(mx.uint8)))


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("weight", "model.a.weight"),
        ("_scale_inv", "model.a.weight_scale_inv"),
        ("scales", "model.a.scales"),
        ("biases", "model.a.biases"),
    ],
)
def test_part_names(part: str, wanted: str) -> None:
    assert part_name("model.a.weight", part) == wanted


def test_part_names_of_a_tensor_without_a_module() -> None:
    assert part_name("weight", "scales") == "scales"
    assert part_name("weight", "_scale_inv") == "weight_scale_inv"
