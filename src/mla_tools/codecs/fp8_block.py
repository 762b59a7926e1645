"""FP8: E4M3 codes, each multiplied with the scale of the block of the weight that it stands in.

A block is 128 x 128 or 32 x 32 values, a whole row, or the whole weight; at the right and lower edges
blocks are cut off, so a [576, 7168] weight in blocks of 128 x 128 has scales [5, 56]. Of a stack of
experts [e, o, i] each has blocks of its own.

Sources: DeepSeek-V3's README_WEIGHTS (`weight_scale_inv` is what a block is multiplied with, the name
notwithstanding), and the headers of DeepSeek V4, Mistral Small 4 and checkpoints of compressed-tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from mla_tools.codecs.codec import Codec, Native, Parts, Quantized, Rows, TargetCodec, refuse
from mla_tools.errors import MlaToolsError
from mla_tools.kernels import decode_e4m3, decode_e8m0
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["E8M0", "GROUP", "MXFP8", "WHOLE", "Fp8Block", "compressed_tensors", "deepseek"]

# A side of a block that is as long as the weight's own.
WHOLE = 0

# A byte u that means 2^(u - 127), 255 NaN. mx.load gives uint8 for E8M0, and some writers do.
E8M0 = frozenset({DType.F8_E8M0, DType.U8})

MXFP8 = Native(QuantSpec("mxfp8"))

GROUP = MXFP8.spec.group_size

# Bytes of working memory that encoding takes for each element, less twice those of the float dtype; the
# growth of mx.get_peak_memory.
_WORKING = 20

_Index = TypeVar("_Index", int, "mx.array")


@dataclass(frozen=True)
class Fp8Block(TargetCodec):
    """E4M3 codes and a scale for each block of `block` rows and columns, a side WHOLE as the weight's.

    `part` and `scales`: the scales' name and dtype. `experts`: the rows of each expert of a stack,
    0 where all rows are one weight. `axes`: how many of the last two axes of the scales, [rows of
    blocks, columns of blocks], their shape has: 2 all, 1 without the columns, 0 neither; an
    axis left out is 1 long, but with 0 the experts stay. `packs`: the scales are powers of two and
    fit mxfp8's groups, so MLX can hold the same numbers.
    """

    block: tuple[int, int] = (128, 128)
    scales: DType = DType.F32
    part: str = "_scale_inv"
    experts: int = 0
    axes: int = 2
    packs: bool = False

    @property
    def name(self) -> str:
        rows, columns = self.block
        if columns != WHOLE:
            return f"fp8 {rows}x{columns}"
        return "fp8 per tensor" if rows == WHOLE else "fp8 per row"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native | None:
        return MXFP8 if self.packs and self.scales in E8M0 else None

    @property
    def on_request(self) -> Native | None:
        # Floats that are declared to be powers of two can be anything.
        return MXFP8 if self.packs else None

    def stacked(self, spec: Spec) -> Codec | None:
        return None if self.experts else replace(self, experts=spec.rows)

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        *head, rows, width = spec.shape
        if not self.experts:
            head, rows = [], spec.rows
        across = 1 if self.block[1] == WHOLE else -(-width // self.block[1])
        shape = (*head, *(self._down(rows), across)[: self.axes])
        return {"weight": Spec(spec.shape, DType.F8_E4M3), self.part: Spec(shape, self.scales)}

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        if start == stop:
            return {"weight": (start, stop), self.part: (0, 0)}
        if self.axes == 2:
            rows = (self._scale_row(start), self._scale_row(stop - 1) + 1)
        elif self.axes == 1 and self.experts:
            rows = (start // self.experts, (stop - 1) // self.experts + 1)
        else:
            rows = (0, 1)
        return {"weight": (start, stop), self.part: rows}

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        values = decode_e4m3(parts["weight"])
        scales = _floats(parts[self.part], self.scales)
        if self._is_tiled(start, stop, values.shape[-1]):
            tall, wide = self.block
            tiles = values.reshape(-1, tall, values.shape[-1] // wide, wide)
            tiles = tiles * scales[:, None, :, None]
            return tiles.reshape(values.shape).astype(getattr(mx, dtype.mlx))
        scales = self._of_rows(scales, start, stop)
        if self.block[1] == WHOLE or values.shape[-1] % self.block[1]:
            values = values * self._spread(scales, values.shape[-1], 1)
        else:
            blocks = values.reshape(stop - start, -1, self.block[1])
            values = (blocks * scales[:, :, None]).reshape(values.shape)
        return values.astype(getattr(mx, dtype.mlx))

    def to_native(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start..stop as mxfp8, bit for bit; this looks at the scales' values.

        Raises MlaToolsError for a scale that is no power of two from 2^-127 to 2^127: NaN too, because
        MLX takes mxfp8's byte 255 for infinity.
        """
        import mlx.core as mx

        if not self.packs:
            return super().to_native(parts, start, stop)
        codes = parts["weight"]
        scales = self._of_rows(self._bytes(parts[self.part]), start, stop)
        scales = self._spread(scales, codes.shape[-1], GROUP)
        return {"weight": mx.contiguous(codes).view(mx.uint32), "scales": scales}

    def check(self, parts: Mapping[str, mx.array]) -> None:
        refuse(_floats(parts[self.part], self.scales), self.part)

    @property
    def rows_together(self) -> int:
        return self.block[0] or sys.maxsize

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        # The scale maps the largest value of a block to 448, the largest E4M3. Powers of two are rounded
        # up, so that no value is larger than that.
        width = array.shape[-1]
        rows = self.experts or array.size // width
        tall, wide = self.block[0] or rows, self.block[1] or width
        values = array.astype(mx.float32).reshape(-1, rows, width)
        values = mx.pad(values, [(0, 0), (0, -rows % tall), (0, -width % wide)])
        _, padded_rows, padded_width = values.shape
        tiles = values.reshape(-1, padded_rows // tall, tall, padded_width // wide, wide)
        scales = mx.maximum(mx.abs(tiles).max(axis=(2, 4)), 1e-12) / 448.0
        if self.packs or self.scales in E8M0:
            bits = scales.view(mx.uint32)
            exponents = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
            stored = exponents.astype(mx.uint8)
            if self.scales not in E8M0:
                stored = _floats(stored, DType.F8_E8M0).astype(getattr(mx, self.scales.mlx))
        else:
            stored = scales.astype(getattr(mx, self.scales.mlx))
        codes = mx.to_fp8(tiles / _floats(stored, self.scales)[:, :, None, :, None])
        codes = codes.reshape(values.shape)[:, :rows, :width].reshape(array.shape)
        shape = self.encoded(Spec(tuple(array.shape), DType.BF16))[self.part].shape
        return {"weight": mx.contiguous(codes), self.part: stored.reshape(shape)}

    def takes(self, native: Native) -> bool:
        return native == MXFP8 and self.block == (1, GROUP) and self.scales in E8M0 and self.axes == 2

    def from_native(self, parts: Parts, native: Native, rows: int) -> dict[str, mx.array]:
        import mlx.core as mx

        return {"weight": mx.contiguous(parts["weight"]).view(mx.uint8), self.part: parts["scales"]}

    def working_bytes(self, elements: int, nbytes: int) -> int:
        return elements * (_WORKING - 2 * nbytes)

    def config(self, found: Quantized) -> dict[str, Any]:
        powers = self.packs or self.scales in E8M0
        if self.part == "_scale":
            strategy = (
                "block" if WHOLE not in self.block else "tensor" if self.block[0] == WHOLE else "channel"
            )
            blocks = {"block_structure": list(self.block)} if strategy == "block" else {}
            section = compressed_tensors(strategy=strategy, **blocks)
            return {"quantization_config": {**section, "ignore": list(found.floats)}}
        section = deepseek(self.block, **({"scale_fmt": "ue8m0"} if powers else {}))
        return {"quantization_config": {**section, "modules_to_not_convert": list(found.floats)}}

    def _down(self, rows: int) -> int:
        """Return the rows of blocks that a weight of this many rows has."""
        return 1 if self.block[0] == WHOLE else -(-rows // self.block[0])

    def _scale_row(self, row: _Index) -> _Index:
        """Return which row of blocks a row stands in, those of all experts counted through."""
        before = row * 0
        if self.experts:
            before = row // self.experts * self._down(self.experts)
            row = row % self.experts
        return before if self.block[0] == WHOLE else before + row // self.block[0]

    def _is_tiled(self, start: int, stop: int, width: int) -> bool:
        """Whether rows start..stop are whole blocks, each with a scale of its own."""
        tall, wide = self.block
        if WHOLE in self.block or self.axes < 2:
            return False
        return not (start % tall or stop % tall or self.experts % tall or width % wide)

    def _of_rows(self, scales: mx.array, start: int, stop: int) -> mx.array:
        """Return the scales of each of the rows start..stop, [rows, blocks], from the stored scales."""
        import mlx.core as mx

        # The row of blocks with which the stored scales at hand begin.
        first = self._scale_row(start)
        if self.axes < 2:
            scales = scales.reshape(-1, 1)
            whole_experts = self.axes == 1 and self.experts
            first = start // self.experts * self._down(self.experts) if whole_experts else 0
        return scales[self._scale_row(mx.arange(start, stop)) - first]

    def _spread(self, scales: mx.array, width: int, unit: int) -> mx.array:
        """Return a scale for each `unit` values of rows of this width, from those of their blocks."""
        import mlx.core as mx

        if self.block[1] == WHOLE:
            return mx.broadcast_to(scales, (scales.shape[0], width // unit))
        return mx.repeat(scales, self.block[1] // unit, axis=1)[:, : width // unit]

    def _bytes(self, scales: mx.array) -> mx.array:
        """Return scales as E8M0 bytes; MlaToolsError where one is none that MLX reads as the same number."""
        import mlx.core as mx

        if self.scales in E8M0:
            found, good = scales, scales != 255
        else:
            bits = scales.astype(mx.float32).view(mx.uint32)
            # One bit of exponent and nothing else, or the one bit that makes the subnormal 2^-127.
            normal = ((bits & 0x807FFFFF) == 0) & (bits != 0) & (bits != 0x7F800000)
            good = normal | (bits == 0x400000)
            found = (bits >> 23).astype(mx.uint8)
        if not mx.all(good).item():
            first = mx.argmax(mx.logical_not(good).reshape(-1))
            number = _floats(scales, self.scales).reshape(-1)[first].item()
            raise MlaToolsError(
                f"mxfp8 scales must be powers of two from 2^-127 to 2^127, but one is {number}"
            )
        return found


def _floats(scales: mx.array, dtype: DType) -> mx.array:
    """Return stored scales as float32, which holds all of them exactly."""
    import mlx.core as mx

    return decode_e8m0(scales) if dtype in E8M0 else scales.astype(mx.float32)


def deepseek(block: tuple[int, int], **more: object) -> dict[str, Any]:
    """Return what DeepSeek's config.json says of FP8 in these blocks."""
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return {**section, "weight_block_size": None if WHOLE in block else list(block), **more}


def compressed_tensors(**weights: object) -> dict[str, Any]:
    """Return what compressed-tensors' config.json says of FP8 with these settings of the weights."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    tokens = {**common, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {**common, **weights}, "input_activations": tokens}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
