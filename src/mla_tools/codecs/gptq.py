"""GPTQ: codes packed along in, transposed, with a zero point and a scale per group of in.

Parts: `qweight` [words of in, out], `qzeros` [groups, words of out], `scales` [groups, out], the
lowest bits first, and `g_idx` [in], the group of each column. The number is (code - zero) * scale.
The first checkpoint format ("gptq") stores zero - 1, the second ("gptq_v2") zero itself.

Columns sorted by activation show in the values of `g_idx` alone, and where 1 was subtracted from a zero
point of 0, readers do not agree on what is there. So both are looked at when data is read, and a
conversion stops rather than make up numbers.

Source: GPTQModel's and AutoGPTQ's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Module, Native, Rows, Sample, TargetCodec, refuse
from mla_tools.codecs.codes import FLOATS, affine, affine_form, dequantized, pack, steps, unpack
from mla_tools.errors import MlaToolsError, clipped
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "Gptq", "claim"]

_BITS = (4, 8)

# checkpoint_format in config.json -> what was subtracted from the zero points.
_SUBTRACTED = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class Gptq(TargetCodec):
    """Codes of 4 or 8 bits in groups of `group`, scales in `dtype`, zero points stored less `subtracted`.

    `symmetric`: every zero point is half the range; what is stored must agree. The tensor's rows, of
    `width` elements, are columns of the parts, so the parts are always read whole, and `width` says
    how many rows those have. It is 0 in a sample, which is encoded only.
    """

    bits: int
    group: int
    symmetric: bool
    subtracted: int
    dtype: DType
    width: int = 0
    g_idx: bool = True

    @property
    def name(self) -> str:
        return f"gptq {self.bits}-bit g{self.group}"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native | None:
        # Rows that do not fill their last word have no form in MLX, and groups of 32 always fill it.
        return affine_form(self.bits, self.group, self.dtype if self.symmetric else DType.F32)

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        rows, width = spec.shape
        if rows % self._per_word or width % self._per_word or width % self.group:
            raise ValueError(
                f"[{rows}, {width}] does not divide into words of {self._per_word} and groups of {self.group}"
            )
        groups = width // self.group
        parts = {
            "qweight": Spec((width // self._per_word, rows), DType.I32),
            "qzeros": Spec((groups, rows // self._per_word), DType.I32),
            "scales": Spec((groups, rows), self.dtype),
        }
        if self.g_idx:
            parts["g_idx"] = Spec((width,), DType.I32)
        return parts

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        groups = (0, self.width // self.group)
        rows = {"qweight": (0, self.width // self._per_word), "qzeros": groups, "scales": groups}
        if self.g_idx:
            rows["g_idx"] = (0, 1)
        return rows

    def _checked_zeros(self, parts: Mapping[str, mx.array], start: int, stop: int) -> mx.array:
        """Return the zero points of rows start..stop, [stop - start, groups].

        This evaluates `g_idx` and the zero points. Raises MlaToolsError if they are not what they must be.
        """
        import mlx.core as mx

        if self.g_idx and not mx.array_equal(parts["g_idx"][0], mx.arange(self.width) // self.group).item():
            raise MlaToolsError(
                "act-order (g_idx) is not supported: the columns are not in the order of their groups"
            )
        first = start - start % self._per_word
        words = parts["qzeros"][:, first // self._per_word : -(-stop // self._per_word)]
        stored = unpack(words, self.bits)[:, start - first : stop - first].T
        zeros = stored + self.subtracted
        half, top = 2 ** (self.bits - 1), 2**self.bits - 1
        if self.symmetric and not mx.all(zeros == half).item():
            raise MlaToolsError(
                f"config.json says sym, so every zero point must be {half} (stored as "
                f"{half - self.subtracted}), but qzeros says otherwise; is checkpoint_format right?"
            )
        if self.subtracted and mx.any(stored == top).item():
            raise MlaToolsError(
                f"a zero point is stored as {top}, which is ambiguous in the first GPTQ format (zero - 1):"
                f" it can mean {top + 1} or 0"
            )
        return zeros

    def _words(self, parts: Mapping[str, mx.array], start: int, stop: int) -> mx.array:
        """Return the codes of rows start..stop, [stop - start, words of in]: MLX's own packing."""
        import mlx.core as mx

        return mx.contiguous(parts["qweight"][:, start:stop].T)

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        zeros = self._checked_zeros(parts, start, stop)
        codes = unpack(self._words(parts, start, stop), self.bits)
        return dequantized(codes, parts["scales"][:, start:stop].T, zeros, dtype)

    def to_native(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        form = self.native
        if form is None:
            return super().to_native(parts, start, stop)
        zeros = self._checked_zeros(parts, start, stop)
        words, scales = self._words(parts, start, stop), parts["scales"][:, start:stop].T
        return affine(words, scales, None if self.symmetric else zeros, form)

    def check(self, parts: Mapping[str, mx.array]) -> None:
        refuse(parts["scales"], "scales")

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        codes, scales, zeros = steps(
            array, self.bits, self.group, self.dtype, symmetric=self.symmetric, least=self.subtracted
        )
        parts = {
            "qweight": mx.contiguous(pack(codes, self.bits).T).view(mx.int32),
            "qzeros": pack((zeros - self.subtracted).T, self.bits).view(mx.int32),
            "scales": mx.contiguous(scales.T),
        }
        if self.g_idx:
            parts["g_idx"] = (mx.arange(array.shape[1]) // self.group).astype(mx.int32)
        return parts


SAMPLES = {
    "gptq": Sample(
        Gptq(4, 64, True, 1, DType.F16),
        DType.F16,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 64,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        },
    )
}


def claim(module: Module) -> list[Claim]:
    """Claim a `qweight` that is not AWQ's with the parts beside it; ValueError where they do not fit."""
    qweight, scales = module.leaves.get("qweight"), module.leaves.get("scales")
    if qweight is None or qweight.dtype is not DType.I32 or len(qweight.shape) != 2:
        return []
    width = module.width
    if width is None or width == qweight.shape[0]:
        return []
    words, rows = qweight.shape
    fitting = [bits for bits in _BITS if words * 32 == width * bits]
    if not fitting:
        raise ValueError(
            f"qweight {qweight} does not hold rows of {width} codes: GPTQ with 4 bits has "
            f"[{width // 8}, out], with 8 bits [{width // 4}, out], and AWQ [{width}, out / 8]"
        )
    if module.quantization.get("desc_act"):
        raise ValueError("act-order (desc_act in config.json) is not supported")
    named = module.quantization.get("checkpoint_format") or "gptq"
    if not isinstance(named, str) or named not in _SUBTRACTED:
        raise ValueError(
            f"GPTQ checkpoint_format {clipped(named)} is not supported, only {', '.join(_SUBTRACTED)}"
        )
    if scales is None or scales.dtype not in FLOATS:
        raise ValueError(f"scales are {scales}; beside qweight they must be F16, BF16 or F32")
    groups = scales.shape[0] if scales.shape else 0
    if not groups or width % groups:
        raise ValueError(f"scales {scales} do not divide rows of {width} into equal groups")
    codec = Gptq(
        fitting[0],
        width // groups,
        module.quantization.get("sym") is True,
        _SUBTRACTED[named],
        scales.dtype,
        width,
        "g_idx" in module.leaves,
    )
    spec = Spec((rows, width), scales.dtype)
    for part, needed in codec.encoded(spec).items():
        found = module.leaves.get(part)
        if found != needed:
            raise ValueError(f"{part} is {found}, but qweight {qweight} in {groups} groups needs {needed}")
    return [Claim("weight", spec, codec, {part: part for part in codec.cut(0, 0)})]
