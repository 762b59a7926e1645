"""`QuantSpec`, one of MLX's quantizations, and the arrays, layers and recipes that it describes.

This module and everything it imports at the top stay free of mlx: plans are made from headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.errors import UsageError
from mla_tools.kernels import encode_mxfp4, encode_nvfp4

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

__all__ = [
    "MODES",
    "RECIPES",
    "QuantSpec",
    "dequantize",
    "dequantize_multilinear",
    "infer_spec",
    "quantize",
    "quantize_multilinear",
    "recipe_spec",
    "with_biases",
]

# mode -> (bits, group sizes); the first of each is not always the default, see _DEFAULTS.
# Source: the table of quantization modes in the documentation of `mlx.core.quantize`.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}

# mode -> (bits, group size), what `mlx_lm.convert --q-mode` takes when nothing else is said.
_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

# recipe -> (bits of most layers, bits of the layers that matter more), as `mlx_lm.convert` has them.
_RECIPE_BITS = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}

# The same recipes for MLA: "mla_mixed_4_6" is "mixed_4_6" with 8 bits for what follows.
_MLA = "mla_"

# The projections that all heads and tokens go through, small and sensitive: the halves of kv_b_proj,
# the low-rank projections, the routers. Their last components in mlx-lm's module paths.
_MLA_PARTS = frozenset(
    {"embed_q", "unembed_out", "kv_b_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate", "classifier"}
)
_MLA_BITS = 8

RECIPES = (*_RECIPE_BITS, *(_MLA + recipe for recipe in _RECIPE_BITS))

# The modes for which MLX has a kernel on a GPU and none on a CPU.
_CPU_ENCODERS = {"mxfp4": encode_mxfp4, "nvfp4": encode_nvfp4}

# MLX packs codes without gaps into words of this many bits.
_WORD_BITS = 32


@dataclass(frozen=True, init=False)
class QuantSpec:
    """One of MLX's quantizations: a mode, the bits of a code, and how many codes share a scale.

    Left out, `bits` and `group_size` are those that `mlx_lm.convert` takes: affine 4 and 64, mxfp4
    4 and 32, mxfp8 8 and 32, nvfp4 4 and 16. Raises UsageError for what MLX does not have.
    """

    mode: str
    bits: int
    group_size: int

    def __init__(self, mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> None:
        if mode not in MODES:
            raise UsageError(f"quantization mode {mode!r} does not exist; the modes are {', '.join(MODES)}")
        default_bits, default_group_size = _DEFAULTS[mode]
        bits = default_bits if bits is None else bits
        group_size = default_group_size if group_size is None else group_size
        for word, value, allowed in zip(("bits", "group size"), (bits, group_size), MODES[mode], strict=True):
            if value not in allowed:
                raise UsageError(
                    f"{mode} quantization has no {word} {value}; it takes {', '.join(map(str, allowed))}"
                )
        # The dataclass is frozen, and its own __init__ could not give the defaults of a mode.
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", group_size)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Return the spec written as BITS[,GROUP[,MODE]], such as "8", "8,32" or "8,32,mxfp8".

        Raises UsageError for anything else.
        """
        fields = [field.strip() for field in text.split(",")]
        numbers, mode = fields[:2], (fields[2] if len(fields) == 3 else "affine")
        if len(fields) > 3 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise UsageError(
                f'{text!r} is not a quantization; write BITS[,GROUP[,MODE]], such as "8,32,affine"'
            )
        return cls(mode, *map(int, numbers))

    @property
    def has_biases(self) -> bool:
        """Whether a `biases` part stands beside `weight` and `scales`."""
        return self.mode == "affine"

    @property
    def config(self) -> dict[str, int | str]:
        """The entry that `mlx_lm` writes under "quantization" in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def divides(self, width: int) -> bool:
        """Return whether rows of `width` elements can be quantized so."""
        return width > 0 and width % self.group_size == 0

    def groups(self, width: int) -> int:
        """Return the number of scales of a row of `width` elements.

        Raises ValueError when the group size does not divide `width`.
        """
        if not self.divides(width):
            raise ValueError(f"group size {self.group_size} does not divide rows of {width} elements")
        return width // self.group_size

    def packed_width(self, width: int) -> int:
        """Return the number of uint32 words of a row of `width` elements.

        Raises ValueError when the group size does not divide `width`.
        """
        # Every group fills whole words, so this division leaves nothing over.
        return self.groups(width) * (self.group_size * self.bits // _WORD_BITS)

    def __str__(self) -> str:
        return f"affine {self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


def infer_spec(*, width: int, packed_width: int, groups: int, scales_are_uint8: bool) -> QuantSpec:
    """Return the spec with which rows of `width` elements became `packed_width` words and `groups` scales.

    Affine weights keep their scales in a float dtype; scales in uint8 mean a block-float mode, and
    each of these has its own pair of bits and group size. Raises ValueError when no spec fits.

    Source: `infer_quant_config` in mlx_lm/utils.py applies the same rule, rounding where this refuses.
    """
    for mode, (all_bits, group_sizes) in MODES.items():
        if (mode == "affine") == scales_are_uint8:
            continue
        for bits in all_bits:
            for group_size in group_sizes:
                exact = (width * bits, width) == (packed_width * _WORD_BITS, groups * group_size)
                if exact and width > 0:
                    return QuantSpec(mode, bits, group_size)
    scales = "uint8" if scales_are_uint8 else "float"
    raise ValueError(
        f"rows of {width} elements stored as {packed_width} uint32 words with {groups} {scales} scales: "
        f"{_ratio(packed_width * _WORD_BITS, width)} bits and group size {_ratio(width, groups)}, "
        "which no quantization mode of MLX has"
    )


def _ratio(dividend: int, divisor: int) -> str:
    return f"{dividend / divisor:g}" if divisor > 0 else "?"


def quantize(array: mx.array, spec: QuantSpec) -> dict[str, mx.array]:
    """Return the parts of `array` quantized along its last axis: weight, scales and, when affine, biases.

    [..., width] float becomes weight [..., packed_width] uint32 and scales [..., groups], in the
    dtype of `array` when affine and in uint8 otherwise; biases are like scales. The bits are those of
    `mx.quantize`. Raises ValueError for fewer than two axes, or a width the group does not divide.
    """
    import mlx.core as mx

    encode = _CPU_ENCODERS.get(spec.mode)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if encode and on_cpu and array.ndim > 1 and array.dtype in (mx.bfloat16, mx.float16, mx.float32):
        return encode(array)
    parts = mx.quantize(array, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def dequantize(parts: Mapping[str, mx.array], spec: QuantSpec, dtype: mx.Dtype | None = None) -> mx.array:
    """Return the float array [..., width] of the parts weight, scales and perhaps biases.

    `dtype` is, when left out, what mlx-lm computes in: that of the scales when affine and bfloat16
    otherwise, and the bits are those of `mx.dequantize`. In any other dtype the numbers are decoded in
    float32 and rounded once, so float32 gives exactly what the parts say, to float32's own rounding.
    Affine parts without biases have biases of zero. Raises KeyError when weight or scales are missing.
    """
    import mlx.core as mx

    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    own_dtype = scales.dtype if spec.mode == "affine" else mx.bfloat16
    dtype = own_dtype if dtype is None else dtype
    if spec.mode == "affine":
        biases = mx.zeros_like(scales) if biases is None else biases
        if dtype != own_dtype:
            # mx.dequantize computes in the dtype of the scales and only then casts to the one asked
            # for: in bfloat16 the code times the scale is already rounded before the bias is added.
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    else:
        biases = None
    decoded = mx.dequantize(
        weight,
        scales,
        biases,
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=None if spec.mode == "affine" else mx.bfloat16 if dtype == mx.bfloat16 else mx.float32,
    )
    return decoded.astype(dtype)


def with_biases(parts: Mapping[str, mx.array], spec: QuantSpec) -> dict[str, mx.array]:
    """Return the parts, with biases of zero where affine parts have none, as MLX's layers want them."""
    import mlx.core as mx

    zeros = {"biases": mx.zeros_like(parts["scales"])} if spec.has_biases else {}
    return zeros | dict(parts)


def quantize_multilinear(layer: MultiLinear, spec: QuantSpec) -> QuantizedMultiLinear:
    """Return the QuantizedMultiLinear of an mlx-lm MultiLinear, as `mlx_lm.convert -q` makes it.

    The weight [h, output, input] is quantized along `input`. Raises ValueError when the group size
    does not divide it, where `mlx_lm.convert` silently leaves the layer unquantized.
    """
    spec.groups(layer.weight.shape[-1])
    return layer.to_quantized(group_size=spec.group_size, bits=spec.bits, mode=spec.mode)


def dequantize_multilinear(layer: QuantizedMultiLinear) -> MultiLinear:
    """Return the MultiLinear [h, output, input] of an mlx-lm QuantizedMultiLinear.

    The dtype is that of the scales when affine and bfloat16 in the block-float modes. `mlx_lm.convert -d`
    does not do this: it leaves these layers quantized although the config no longer says so, and the
    result cannot be loaded.
    """
    from mlx_lm.models.mla import MultiLinear

    parts = {"weight": layer.weight, "scales": layer.scales}
    if layer.get("biases") is not None:
        parts["biases"] = layer.biases
    weight = dequantize(parts, QuantSpec(layer.mode, layer.bits, layer.group_size))
    num_heads, output_dims, input_dims = weight.shape
    dense = MultiLinear(input_dims, output_dims, num_heads)
    dense.weight = weight
    return dense


def recipe_spec(recipe: str, path: str, num_layers: int, group_size: int = 64) -> QuantSpec:
    """Return what `mlx_lm.convert --quant-predicate RECIPE` takes for the module at `path`.

    The layer index is the number after the first component "layers", as in "model.layers.7.mlp" and
    "language_model.model.layers.7.mlp". A path without one counts as index 0, as in mlx-lm; so does
    "model.ngram_embeddings.embedders.0" (LongCat Flash), where mlx-lm stops at int("embedders").
    Names are compared as mlx-lm compares them: "v_b_proj" is also found in "kv_b_proj". The recipes
    "mla_mixed_…" are ours: embed_q, unembed_out, the low-rank projections, routers and indexers get 8
    bits, all else what the recipe without "mla_" says. Raises UsageError for an unknown recipe or a
    group size that affine quantization does not have.

    Source: `mixed_quant_predicate_builder` in mlx_lm/convert.py, after llama.cpp's Q4_K_M.
    """
    if recipe not in RECIPES:
        raise UsageError(f"predicate {recipe!r} does not exist; the predicates are {', '.join(RECIPES)}")
    if recipe.startswith(_MLA) and (path.rpartition(".")[2] in _MLA_PARTS or ".indexer." in path):
        return QuantSpec("affine", _MLA_BITS, group_size)
    low, high = _RECIPE_BITS[recipe.removeprefix(_MLA)]
    index = _layer_index(path)
    eighth = num_layers // 8
    # The first and the last eighth of the layers, and every third one between.
    matters = index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2
    sensitive = any(word in path for word in ("v_proj", "v_a_proj", "v_b_proj", "down_proj"))
    return QuantSpec("affine", high if "lm_head" in path or (sensitive and matters) else low, group_size)


def _layer_index(path: str) -> int:
    components = path.split(".")
    if "layers" not in components:
        return 0
    after = components[components.index("layers") + 1 :]
    return int(after[0]) if after and after[0].isdigit() else 0
