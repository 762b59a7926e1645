"""`Spec`, the shape and dtype of a tensor without its data, and the one table of dtypes."""

from __future__ import annotations

import math
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["DType", "Spec", "spec_of"]


class DType(Enum):
    """The dtypes that a safetensors header can name.

    Each member carries its width in bits, its kind ("float", "int" or "bool") and the name of the
    MLX and numpy dtypes in which its bytes are held. MLX has no 8-bit floats: F8_E4M3, F8_E5M2 and
    F8_E8M0 are held as uint8 there, as `mx.load` does; bfloat16 does not exist in numpy and is held
    as uint16 there. Source: the safetensors format description.
    """

    BOOL = (8, "bool", "bool_", "bool")
    U8 = (8, "int", "uint8", "uint8")
    I8 = (8, "int", "int8", "int8")
    F8_E4M3 = (8, "float", "uint8", "uint8")
    F8_E5M2 = (8, "float", "uint8", "uint8")
    F8_E8M0 = (8, "float", "uint8", "uint8")
    U16 = (16, "int", "uint16", "uint16")
    I16 = (16, "int", "int16", "int16")
    F16 = (16, "float", "float16", "float16")
    BF16 = (16, "float", "bfloat16", "uint16")
    U32 = (32, "int", "uint32", "uint32")
    I32 = (32, "int", "int32", "int32")
    F32 = (32, "float", "float32", "float32")
    U64 = (64, "int", "uint64", "uint64")
    I64 = (64, "int", "int64", "int64")
    F64 = (64, "float", "float64", "float64")

    def __init__(self, bits: int, kind: str, mlx: str, numpy: str) -> None:
        self.bits = bits
        self.kind = kind
        self.mlx = mlx
        self.numpy = numpy

    # Enum would take equal values for aliases of one member; the name makes each value its own.
    def __new__(cls, *fields: object) -> DType:
        member = object.__new__(cls)
        member._value_ = (len(cls.__members__), *fields)
        return member

    # Members are unique objects; Enum's own hash goes through the name and is slow.
    __hash__ = object.__hash__

    @property
    def nbytes(self) -> int:
        """The width in bytes."""
        return self.bits // 8


class Spec(NamedTuple):
    """The shape and dtype of a tensor. A tuple, because a checkpoint has a hundred thousand of them."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the data."""
        return self.size * self.dtype.nbytes

    @property
    def width(self) -> int:
        """The length of the last axis; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """The number of rows when all axes but the last are taken as one."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """The number of bytes of one row."""
        return self.width * self.dtype.nbytes

    def __str__(self) -> str:
        return f"{self.dtype.name} [{', '.join(map(str, self.shape))}]"


# By the names that MLX's dtypes print; 8-bit floats are bytes there.
_HELD = {dtype.mlx.rstrip("_"): dtype for dtype in DType if not dtype.name.startswith("F8")}


@lru_cache(maxsize=1024)
def _spec(shape: tuple[int, ...], dtype: mx.Dtype) -> Spec | None:
    held = _HELD.get(str(dtype).rpartition(".")[2])
    return None if held is None else Spec(shape, held)


def spec_of(array: mx.array) -> Spec | None:
    """Return the spec of an array as `mx.load` gives it; None where no checkpoint holds its dtype."""
    # A hundred thousand tensors have a dozen specs.
    return _spec(array.shape, array.dtype)
