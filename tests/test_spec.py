"""`Spec` and the dtype table against numpy, ml_dtypes, mlx and the safetensors library."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mla_tools.files.safetensors import layout
from mla_tools.files.writer import Writer
from mla_tools.spec import DType, Spec, spec_of

# What the values of each dtype are, said by other people's libraries.
MEANING: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}

each_dtype = pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.name)


def test_the_table_has_these_dtypes_and_no_others() -> None:
    assert set(DType.__members__) == MEANING.keys()
    assert len({*DType}) == len(MEANING)


@each_dtype
def test_width_and_kind_are_those_of_the_values(dtype: DType) -> None:
    meaning = MEANING[dtype.name]
    assert dtype.bits == meaning.itemsize * 8
    assert dtype.nbytes == meaning.itemsize
    whole = {"b": "bool", "u": "int", "i": "int"}
    assert dtype.kind == whole.get(meaning.kind, "float")


@each_dtype
def test_the_holding_dtypes_have_the_same_width(dtype: DType) -> None:
    assert np.dtype(dtype.numpy).itemsize == dtype.nbytes
    assert getattr(mx, dtype.mlx).size == dtype.nbytes


@each_dtype
def test_equality_and_hash_tell_members_apart(dtype: DType) -> None:
    assert [other for other in DType if other == dtype] == [dtype]
    assert {dtype: 1}[DType[dtype.name]] == 1


@pytest.mark.parametrize("name", ["F32", "F16", "I64", "U32", "U8", "BOOL", "I16"])
def test_a_file_of_this_dtype_is_read_so_by_the_safetensors_library(name: str, tmp_path: Path) -> None:
    spec = Spec((2, 3), DType[name])
    with Writer(tmp_path / "x.safetensors", layout({"x": spec}, {})) as writer:
        writer.write("x", 0, np.zeros(spec.nbytes, np.uint8))
        writer.finish()
    (array,) = load_file(tmp_path / "x.safetensors").values()
    assert array.dtype == MEANING[name]
    assert array.shape == spec.shape


@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(list(DType)))
def test_sizes_are_those_of_a_numpy_array(shape: list[int], dtype: DType) -> None:
    spec = Spec(tuple(shape), dtype)
    array = np.zeros(shape, dtype.numpy)
    assert (spec.size, spec.nbytes) == (array.size, array.nbytes)
    assert spec.rows * spec.width == array.size
    assert spec.rows * spec.row_bytes == array.nbytes
    assert spec.width == (shape[-1] if shape else 1)


def test_text() -> None:
    assert str(Spec((7168, 2048), DType.F8_E4M3)) == "F8_E4M3 [7168, 2048]"
    assert str(Spec((), DType.I64)) == "I64 []"


@each_dtype
def test_the_spec_of_an_array_is_what_its_file_said(dtype: DType) -> None:
    array = mx.zeros((2, 3), getattr(mx, dtype.mlx))
    # MLX has no 8-bit floats and holds their bytes.
    held = DType.U8 if dtype.name.startswith("F8") else dtype
    assert spec_of(array) == Spec((2, 3), held)


def test_an_array_that_no_checkpoint_holds_has_no_spec() -> None:
    assert spec_of(mx.zeros(2, mx.complex64)) is None
