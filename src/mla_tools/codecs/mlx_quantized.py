"""MLX's own quantization: codes packed in uint32 along the last axis, scales and maybe biases per group.

Source: the documentation of mx.quantize and the shapes that it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mla_tools.codecs.codec import (
    GLOBAL_SCALE,
    NEUTRAL,
    Claim,
    Codec,
    Module,
    Native,
    Parts,
    Quantized,
    Rows,
    TargetCodec,
    recast,
    refuse,
)
from mla_tools.errors import UsageError, clipped
from mla_tools.kernels import AFFINE_BLOCK, BLOCK, encode_affine
from mla_tools.names import natural
from mla_tools.quantization import QuantSpec, dequantize, infer_spec, quantize, with_biases
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["MlxQuantized", "bare", "claim", "config_of", "stored_as"]

_FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})

# Bytes of working memory that encoders need for each byte of the floats, the growth of
# mx.get_peak_memory. Some of them work on a block at a time: its elements, and the same for each of these.
_WORKING = {"affine": 0.7, "mxfp8": 2.5, "mxfp4": 2.0, "nvfp4": 2.0}
_BLOCK_WORKING = {"affine": (AFFINE_BLOCK, 8), "mxfp4": (BLOCK, 20), "nvfp4": (BLOCK, 20)}


@dataclass(frozen=True)
class MlxQuantized(TargetCodec):
    """A tensor in one of MLX's four modes.

    `dtype` is the float dtype that it decodes to and that it was or is encoded from; affine scales and
    biases have it. An affine tensor without `biases` has biases of zero. `expert_rows`: the rows of
    an expert, which have one global scale; None without global scales.
    """

    spec: QuantSpec
    dtype: DType
    biases: bool
    expert_rows: int | None = None

    @property
    def name(self) -> str:
        return str(self.spec) if self.expert_rows is None else f"{self.spec} with global scales"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native:
        return Native(self.spec, self.dtype, self.expert_rows is not None)

    @property
    def is_mlx(self) -> bool:
        return True

    @property
    def computes_in(self) -> DType | None:
        return self.dtype if self.spec.has_biases else None

    def stacked(self, spec: Spec) -> Codec | None:
        return self if self.expert_rows is None else None

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        *head, width = spec.shape
        groups = (*head, self.spec.groups(width))
        scales = self.dtype if self.spec.has_biases else DType.U8
        parts = {
            "weight": Spec((*head, self.spec.packed_width(width)), DType.U32),
            "scales": Spec(groups, scales),
        }
        if self.biases:
            parts["biases"] = Spec(groups, self.dtype)
        if self.expert_rows is not None:
            parts[GLOBAL_SCALE] = Spec((spec.rows // self.expert_rows,), DType.F32)
        return parts

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        rows = (start, stop)
        found = dict.fromkeys(("weight", "scales", "biases") if self.biases else ("weight", "scales"), rows)
        # It has one axis, so it is one row, and short enough to be read whole.
        return found if self.expert_rows is None else {**found, GLOBAL_SCALE: (0, 1)}

    def decode(self, parts: Parts, start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        wanted = getattr(mx, dtype.mlx)
        if self.expert_rows is None:
            return dequantize(dict(parts), self.spec, wanted)
        factors = self._each_row(parts, start, stop) / NEUTRAL
        return (dequantize(parts, self.spec, mx.float32) * factors).astype(wanted)

    def to_native(self, parts: Parts, start: int, stop: int) -> dict[str, mx.array]:
        kept = with_biases(parts, self.spec)
        return (
            kept if self.expert_rows is None else {**kept, GLOBAL_SCALE: self._each_row(parts, start, stop)}
        )

    def check(self, parts: Parts) -> None:
        if self.expert_rows is not None:
            refuse(parts[GLOBAL_SCALE], GLOBAL_SCALE)

    def declared(self, config: Mapping[str, Any]) -> Callable[[Sequence[str]], str | None] | None:
        given = config.get("quantization")
        if not isinstance(given, Mapping):
            return None

        def tell(paths: Sequence[str]) -> str | None:
            entry = next((given[path] for path in paths if isinstance(given.get(path), Mapping)), given)
            said = _entry_text(entry)
            return None if said == str(self.spec) else f"quantization in config.json says {said}"

        return tell

    def _each_row(self, parts: Parts, start: int, stop: int) -> mx.array:
        """Return the global scale of each of the rows start..stop, [rows, 1]."""
        import mlx.core as mx

        assert self.expert_rows is not None
        return parts[GLOBAL_SCALE].reshape(-1, 1)[mx.arange(start, stop) // self.expert_rows]

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        if self.expert_rows is not None:
            raise TypeError("global scales are copied and never computed")
        return quantize(array, self.spec)

    def encode_now(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        if self.spec.mode == "affine" and mx.default_device().type == mx.DeviceType.cpu and array.ndim > 1:
            return encode_affine(array, self.spec.group_size, self.spec.bits)
        return self.encode(array)

    def finish(self, parts: Parts, start: int, spec: Spec) -> dict[str, mx.array]:
        """Return the parts of rows from `start` on with the global scales of the experts that begin there.

        They come as one for each row. Where rows lie in the midst of an expert there is none to write.
        """
        if self.expert_rows is None:
            return dict(parts)
        rest = {part: array for part, array in parts.items() if part != GLOBAL_SCALE}
        each = parts[GLOBAL_SCALE].reshape(-1)
        first = -start % self.expert_rows
        return {**rest, GLOBAL_SCALE: each[first :: self.expert_rows]} if first < each.size else rest

    def offset(self, part: str, start: int, stored: Spec) -> int:
        if part == GLOBAL_SCALE and self.expert_rows is not None:
            return -(-start // self.expert_rows) * stored.dtype.nbytes
        return start * stored.row_bytes

    def takes(self, native: Native) -> bool:
        return native.spec == self.spec and (self.expert_rows is not None or not native.global_scale)

    def widens(self, native: Native) -> bool:
        # Block-float scales are bytes, whatever dtype they are decoded to. What is made of affine scales may
        # be too large for their dtype and not for the target's.
        return native.dtype is not self.dtype and self.spec.has_biases

    def from_native(self, parts: Parts, native: Native, rows: int) -> dict[str, mx.array]:
        import mlx.core as mx

        made = recast(parts, self.dtype) if self.widens(native) else dict(parts)
        if self.expert_rows is not None and not native.global_scale:
            # MLX divides it by itself, and 1 changes nothing.
            made[GLOBAL_SCALE] = mx.full((rows, 1), NEUTRAL, mx.float32)
        return made

    def in_dtype(self, dtype: DType) -> MlxQuantized:
        return replace(self, dtype=dtype)

    def working_bytes(self, elements: int, nbytes: int) -> int:
        most, needed = _BLOCK_WORKING.get(self.spec.mode, (0, 0))
        return int(elements * nbytes * _WORKING[self.spec.mode]) + nbytes * min(elements, most) * needed

    def config(self, found: Quantized) -> dict[str, Any]:
        return config_of(found)


def stored_as(
    spec: QuantSpec, dtype: DType, sources: Sequence[Codec], rows: int | None
) -> tuple[MlxQuantized, DType]:
    """Return how MLX stores a tensor in a mode, and the float dtype in which it is computed.

    `dtype` is that of the floats, `sources` are the codecs of what it is made of, and `rows` are those of an
    expert, which the module can hold a global scale for.
    """
    if not spec.has_biases:
        # These modes hold no float dtype, so none can be changed. A global scale is held where there is one
        # and it can be; experts without one get one that changes nothing.
        for expert_rows in (None, rows):
            codec = MlxQuantized(spec, DType.BF16, False, expert_rows)
            if all(source.on_request and codec.takes(source.on_request) for source in sources):
                return codec, DType.BF16
    return MlxQuantized(spec, dtype, spec.has_biases), dtype


# --- config.json ---------------------------------------------------------------------------------------


def config_of(found: Quantized) -> dict[str, Any]:
    """Return the section on quantization as mlx-lm writes it, under both its names, or {}."""
    specs = {path: codec.spec for path, codec in found.codecs.items() if isinstance(codec, MlxQuantized)}
    copied = _copied_entries(found)
    if not specs and not copied:
        return {}
    section: dict[str, Any] = _default_entry(found.source)
    default = found.asked
    if specs:
        default = default or _source_default(specs, found)
        section = dict(default.config)
    section |= copied
    for path in sorted(specs, key=natural):
        codec, spec = found.codecs[path], specs[path]
        shares = GLOBAL_SCALE if isinstance(codec, MlxQuantized) and codec.expert_rows is not None else None
        if spec != default or path in found.named or shares:
            section[path] = {**spec.config, **({GLOBAL_SCALE: True} if shares else {})}
    # The second name is what the hub shows a model's quantization by.
    return {"quantization": section, "quantization_config": {**section}}


def _default_entry(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an MLX source's config says of modules that it does not name."""
    given = {key: source[key] for key in ("group_size", "bits", "mode") if source.get(key)}
    return {"mode": "affine"} | given


def _copied_entries(found: Quantized) -> dict[str, Any]:
    """Return the entries of modules that were copied with MLX's quantization."""
    paths = (name.removesuffix(".scales") for name in found.copied if name.endswith(".scales"))
    entries = {path: found.source.get(path, True) for path in sorted(paths, key=natural)}
    default = _default_entry(found.source)
    return {path: entry if isinstance(entry, Mapping) else default for path, entry in entries.items()}


def _source_default(specs: Mapping[str, QuantSpec], found: Quantized) -> QuantSpec:
    """Return the quantization that config.json names first: the source's own default, or the commonest."""
    moved = [specs[path] for path in found.moved if path in specs]
    counted = Counter(moved or specs.values())
    for spec in counted:
        if all((found.source.get(key) or "affine") == value for key, value in spec.config.items()):
            return spec
    return counted.most_common(1)[0][0]


def _entry_text(entry: Mapping[str, Any]) -> str:
    """Return the quantization that mlx_lm.load takes from an entry, with the mode's defaults."""
    given = {key: entry.get(key) for key in ("mode", "bits", "group_size")}
    try:
        return str(QuantSpec(given["mode"] or "affine", given["bits"], given["group_size"]))
    except UsageError:
        return clipped(given)


# --- what is stored ------------------------------------------------------------------------------------


def bare(codecs: Iterable[Codec]) -> tuple[list[Codec], list[Codec]]:
    """Return which affine codecs of a checkpoint lack the biases that MLX has, and the others."""
    affine = [codec for codec in codecs if isinstance(codec, MlxQuantized) and codec.spec.has_biases]
    return [codec for codec in affine if not codec.biases], [codec for codec in affine if codec.biases]


def claim(module: Module) -> list[Claim]:
    """Claim `weight` in uint32 together with `scales` and maybe `biases`."""
    weight, scales = module.leaves.get("weight"), module.leaves.get("scales")
    biases = module.leaves.get("biases")
    if weight is None or scales is None or weight.dtype is not DType.U32:
        return []
    if module.width is None:
        return []
    if weight.shape[:-1] != scales.shape[:-1] or not weight.shape or 0 in weight.shape + scales.shape:
        raise ValueError(f"scales {scales} do not belong to weight {weight}: the rows differ")
    if biases is not None and biases != scales:
        raise ValueError(f"biases {biases} differ from scales {scales}")
    is_block_float = scales.dtype is DType.U8
    if not is_block_float and scales.dtype not in _FLOATS:
        raise ValueError(f"scales are {scales.dtype.name}, which no MLX mode uses")
    if is_block_float and biases is not None:
        raise ValueError("scales in uint8 belong to a mode without biases, but there are biases")
    spec = infer_spec(
        width=module.width,
        packed_width=weight.shape[-1],
        groups=scales.shape[-1],
        scales_are_uint8=is_block_float,
    )
    # The block-float modes do not say what they were made from; bfloat16 is what MLX decodes them to.
    dtype = DType.BF16 if is_block_float else scales.dtype
    expert_rows = None
    if GLOBAL_SCALE in module.leaves:
        found, needed = module.leaves[GLOBAL_SCALE], Spec(weight.shape[:1], DType.F32)
        if spec.mode != "nvfp4" or len(weight.shape) != 3 or found != needed:
            raise ValueError(
                f"{GLOBAL_SCALE} is {found}; beside {spec} codes {weight} it must be one F32 number for each"
                " expert of nvfp4 [experts, rows, words]"
            )
        expert_rows = weight.shape[1]
    codec = MlxQuantized(spec, dtype, biases is not None, expert_rows)
    parts = {part: part for part in codec.cut(0, 0)}
    return [Claim("weight", Spec((*weight.shape[:-1], module.width), dtype), codec, parts)]
