"""AWQ: 4-bit codes packed along out, transposed, with a zero point and a scale per group of in.

Parts: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out]; the number is
(code - zero) * scale. The tensor [out, in] is their transpose. The eight nibbles of a word, lowest
first, are its columns 0, 2, 4, 6, 1, 3, 5, 7.

Source: the "gemm" version of AutoAWQ's checkpoints, as `_unpack_awq_weights` of mlx-lm reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Module, Native, Rows, Sample, TargetCodec, refuse
from mla_tools.codecs.codes import FLOATS, affine, affine_form, dequantized, pack, steps, unpack
from mla_tools.errors import clipped
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "Awq", "claim"]

_BITS = 4
_PER_WORD = 8

# Nibble -> column of its word, and column -> nibble.
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq(TargetCodec):
    """4-bit codes in groups of `group`, scales in `dtype`, of a tensor whose rows have `width` elements.

    Its rows are columns of the parts, so the parts are always read whole, and `width` says how many
    rows those have. It is 0 in a sample, which is encoded only.
    """

    group: int
    dtype: DType
    width: int = 0

    @property
    def name(self) -> str:
        return f"awq {_BITS}-bit g{self.group}"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native | None:
        return affine_form(_BITS, self.group, DType.F32)

    @property
    def is_unpacked_by_mlx_lm(self) -> bool:
        return True

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        rows, width = spec.shape
        if rows % _PER_WORD or width % self.group:
            raise ValueError(f"[{rows}, {width}] does not divide into words of 8 and groups of {self.group}")
        groups, words = width // self.group, rows // _PER_WORD
        return {
            "qweight": Spec((width, words), DType.I32),
            "qzeros": Spec((groups, words), DType.I32),
            "scales": Spec((groups, rows), self.dtype),
        }

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        groups = (0, self.width // self.group)
        return {"qweight": (0, self.width), "qzeros": groups, "scales": groups}

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        codes, zeros = _columns(parts["qweight"], start, stop), _columns(parts["qzeros"], start, stop)
        return dequantized(codes, parts["scales"][:, start:stop].T, zeros, dtype)

    def to_native(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        form = self.native
        if form is None:
            return super().to_native(parts, start, stop)
        words = pack(_columns(parts["qweight"], start, stop), _BITS)
        zeros = _columns(parts["qzeros"], start, stop)
        return affine(words, parts["scales"][:, start:stop].T, zeros, form)

    def check(self, parts: Mapping[str, mx.array]) -> None:
        refuse(parts["scales"], "scales")

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        codes, scales, zeros = steps(array, _BITS, self.group, self.dtype, symmetric=False)
        return {"qweight": _words(codes), "qzeros": _words(zeros), "scales": mx.contiguous(scales.T)}


def _columns(words: mx.array, start: int, stop: int) -> mx.array:
    """Return columns start..stop of [rows, words] as codes [stop - start, rows]."""
    import mlx.core as mx

    first = start - start % _PER_WORD
    nibbles = unpack(words[:, first // _PER_WORD : -(-stop // _PER_WORD)], _BITS)
    nibbles = nibbles.reshape(words.shape[0], -1, _PER_WORD)
    # Slices, because MLX takes many times as long to gather by an array of indices.
    codes = mx.stack([nibbles[..., nibble] for nibble in _NIBBLES], axis=-1)
    return codes.reshape(words.shape[0], -1)[:, start - first : stop - first].T


def _words(codes: mx.array) -> mx.array:
    """Return codes [columns, rows] as words [rows, columns / 8]; undoes `_columns`."""
    import mlx.core as mx

    nibbles = codes.T.reshape(codes.shape[1], -1, _PER_WORD)[..., mx.array(_COLUMNS)]
    return pack(nibbles.reshape(codes.shape[1], -1), _BITS).view(mx.int32)


SAMPLES = {
    "awq": Sample(
        Awq(64, DType.F16),
        DType.F16,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    )
}


def claim(module: Module) -> list[Claim]:
    """Claim a `qweight` of as many rows as the tensor has columns; ValueError where the rest does not fit.

    A GPTQ `qweight` has the same name and an eighth or a quarter of the rows.
    """
    qweight, scales = module.leaves.get("qweight"), module.leaves.get("scales")
    if qweight is None or qweight.dtype is not DType.I32 or len(qweight.shape) != 2:
        return []
    width, words = qweight.shape
    if width != module.width:
        return []
    version = module.quantization.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise ValueError(f'AWQ version {clipped(version)} is not supported, only "gemm"')
    if "g_idx" in module.leaves:
        raise ValueError(f"g_idx belongs to GPTQ, but qweight {qweight} has the shape of AWQ")
    if scales is None or scales.dtype not in FLOATS:
        raise ValueError(f"scales are {scales}; beside qweight they must be F16, BF16 or F32")
    groups = scales.shape[0] if scales.shape else 0
    if not groups or width % groups:
        raise ValueError(f"scales {scales} do not divide rows of {width} into equal groups")
    codec = Awq(width // groups, scales.dtype, width)
    spec = Spec((words * _PER_WORD, width), scales.dtype)
    for part, needed in codec.encoded(spec).items():
        found = module.leaves.get(part)
        if found != needed:
            raise ValueError(f"{part} is {found}, but qweight {qweight} in {groups} groups needs {needed}")
    return [Claim("weight", spec, codec, {part: part for part in codec.cut(0, 0)})]
