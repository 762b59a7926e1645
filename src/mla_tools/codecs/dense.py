"""Dense: one stored tensor, floats or integers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Codec, Module, Rows, Sample, TargetCodec
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "Dense", "claim"]

_DTYPES = frozenset({DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32})


@dataclass(frozen=True)
class Dense(TargetCodec):
    """A tensor stored as itself."""

    dtype: DType

    @property
    def name(self) -> str:
        return self.dtype.name.lower()

    @property
    def quantized(self) -> bool:
        return False

    def stacked(self, spec: Spec) -> Codec | None:
        return self

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        return {"weight": Spec(spec.shape, self.dtype)}

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        return {"weight": (start, stop)}

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        stored = parts["weight"]
        # Integers are narrowed by an op, which looks whether they fit.
        return stored if dtype.kind == "int" else stored.astype(getattr(mx, dtype.mlx))

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        return {"weight": array.astype(getattr(mx, self.dtype.mlx))}


SAMPLES = {dtype.name.lower(): Sample(Dense(dtype), dtype) for dtype in (DType.BF16, DType.F16, DType.F32)}


def claim(module: Module) -> list[Claim]:
    """Claim every leaf on its own whose dtype can be computed with."""
    return [
        Claim(leaf, spec, Dense(spec.dtype), {"weight": leaf})
        for leaf, spec in module.leaves.items()
        if spec.dtype in _DTYPES
    ]
