"""MLA array math: the fused kv_b projection split into per-head projections and back, and heads sharded.

Axis letters: h heads, n nope (qk_nope_head_dim), v value (v_head_dim), r kv rank (kv_lora_rank).

    kv_b_proj    [h*(n+v), r]   rows head-major, per head n rows of K and then v rows of V
    embed_q      [h, r, n]      the rows of K, transposed: queries into the latent space
    unembed_out  [h, v, r]      the rows of V as they are: from the latent space to the values

The source of the layouts is `kv_b_proj` of DeepSeek's modeling files and `MultiLinear` of mlx-lm
(mlx_lm/models/mla.py, the attention and `sanitize` of mlx_lm/models/deepseek_v3.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mla_tools.errors import Problem, UsageError
from mla_tools.quantization import MODES, QuantSpec, dequantize, infer_spec, quantize, with_biases

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "merge_kv_b",
    "merge_kv_b_proj_weights",
    "shard_mla_projections",
    "split_kv_b",
    "split_kv_b_proj_weights",
]

# The stored parts of one MLX weight. A dense weight has the first alone.
_PARTS = ("weight", "scales", "biases")


def split_kv_b(
    kv_b: mx.array, *, num_heads: int, qk_nope_head_dim: int, v_head_dim: int
) -> tuple[mx.array, mx.array]:
    """Return (embed_q [h, r, n], unembed_out [h, v, r]) of a fused kv_b [h*(n+v), r], in its dtype.

    Any dtype will do. For the packed part of a quantized weight [h*(n+v), words], or its scales
    [h*(n+v), groups], only the second result means anything: it is that part of unembed_out, bit for
    bit, whereas the transposed first result mixes the codes of r where those of n are needed.

    Raises ValueError when kv_b does not have two axes or its rows are not num_heads *
    (qk_nope_head_dim + v_head_dim).
    """
    import mlx.core as mx

    layout = _kv_b_layout(num_heads, qk_nope_head_dim, v_head_dim)
    if kv_b.ndim != 2 or kv_b.shape[0] != layout.shape[0]:
        raise layout.unlike("kv_b", kv_b)
    # [h*(n+v), r] -> [h, n+v, r]
    heads = kv_b.reshape(num_heads, qk_nope_head_dim + v_head_dim, kv_b.shape[-1])
    # [h, n, r] -> [h, r, n]
    embed_q = mx.contiguous(heads[:, :qk_nope_head_dim].swapaxes(-1, -2))
    # [h, v, r]
    unembed_out = mx.contiguous(heads[:, qk_nope_head_dim:])
    return embed_q, unembed_out


def merge_kv_b(embed_q: mx.array, unembed_out: mx.array) -> mx.array:
    """Return the fused kv_b [h*(n+v), r] of embed_q [h, r, n] and unembed_out [h, v, r], in their dtype.

    The inverse of `split_kv_b`, bit for bit. Raises ValueError when the two do not have three axes
    each, the same h, the same r and the same dtype.
    """
    import mlx.core as mx

    if embed_q.ndim != 3 or unembed_out.ndim != 3:
        raise _mismatch(embed_q, unembed_out, "three axes each")
    if embed_q.shape[0] != unembed_out.shape[0]:
        raise _mismatch(embed_q, unembed_out, "the same number of heads on their first axes")
    if embed_q.shape[1] != unembed_out.shape[2]:
        raise _mismatch(embed_q, unembed_out, "the same kv_lora_rank on axis 1 of embed_q, 2 of unembed_out")
    if embed_q.dtype != unembed_out.dtype:
        raise _mismatch(embed_q, unembed_out, "one dtype")
    # [h, n, r] and [h, v, r] -> [h, n+v, r] -> [h*(n+v), r]
    heads = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1)
    return heads.reshape(-1, heads.shape[-1])


def split_kv_b_proj_weights(
    weights: dict[str, mx.array],
    prefix: str,
    *,
    num_heads: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
    kv_lora_rank: int,
    embed_q: Literal["source", "float"] | QuantSpec = "source",
) -> dict[str, mx.array]:
    """Return `weights` with `{prefix}.kv_b_proj` replaced by `{prefix}.embed_q` and `{prefix}.unembed_out`.

    The dict that was handed in is itself changed and returned: the fused arrays are popped, because
    their memory must be free again before the next layer. Without a kv_b_proj (split already) it is
    returned as it is. `prefix` is that of the attention, such as "model.layers.0.self_attn".

    kv_b_proj is dense, [h*(n+v), r] in a float dtype, or quantized by MLX: weight [h*(n+v), words]
    uint32, scales [h*(n+v), groups] and, when affine, biases. Mode, bits and group size are inferred
    from the parts and kv_lora_rank. Affine scales without biases mean biases of zero.

    Dense gives dense, whatever `embed_q` says. Quantized gives:

    * unembed_out [h, v, r]: a row slice of each part, equal bits in every mode. Where an affine source
      has no biases, zeros are written, for mlx-lm's QuantizedMultiLinear loads strictly only with them.
    * embed_q [h, r, n]: the axis that shares scales is another one now, so K is decoded, transposed
      and encoded again. `embed_q` says how: "source", the mode, bits and group size of the source,
      which is, bit for bit, what mlx-lm makes of an affine weight; a QuantSpec (QuantSpec(bits=8,
      group_size=32) loses a tenth of what a 4-bit "source" loses); or "float", not encoded at all, in
      the dtype of the scales (bfloat16 in the block-float modes). A later `nn.quantize` or config must
      agree with the choice.

    Raises ValueError, with `weights` as it was, when a part is missing or its shape or dtype does not fit the
    numbers, when the group size of embed_q does not divide qk_nope_head_dim, or when the dict holds
    both kv_b_proj and what it would become. Raises UsageError for another value of `embed_q`.
    """
    if not isinstance(embed_q, QuantSpec) and embed_q not in ("source", "float"):
        raise UsageError(f'embed_q = {embed_q!r}: it takes "source", "float" or a QuantSpec')
    name, k_name, v_name = (f"{prefix}.{word}" for word in ("kv_b_proj", "embed_q", "unembed_out"))
    sizes = {"num_heads": num_heads, "qk_nope_head_dim": qk_nope_head_dim, "v_head_dim": v_head_dim}
    parts = _parts(weights, name)
    if not parts:
        return weights
    for other in (k_name, v_name):
        _refuse_both(weights, name, other)
    spec = _read(parts, name, _kv_b_layout(**sizes, kv_lora_rank=kv_lora_rank))

    if spec is None:
        k, v = split_kv_b(parts["weight"], **sizes)
        new = {f"{k_name}.weight": k, f"{v_name}.weight": v}
    else:
        k_spec = spec if embed_q == "source" else embed_q
        if isinstance(k_spec, QuantSpec) and not k_spec.divides(qk_nope_head_dim):
            raise _indivisible(name, k_spec, qk_nope_head_dim)
        k, _ = split_kv_b(dequantize(parts, spec), **sizes)
        k_parts = quantize(k, k_spec) if isinstance(k_spec, QuantSpec) else {"weight": k}
        new = {f"{k_name}.{part}": array for part, array in k_parts.items()}
        for part, array in with_biases(parts, spec).items():
            _, new[f"{v_name}.{part}"] = split_kv_b(array, **sizes)

    return _replace(weights, (name,), new)


def merge_kv_b_proj_weights(
    weights: dict[str, mx.array],
    prefix: str,
    *,
    num_heads: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
    kv_lora_rank: int,
    kv_b: Literal["source", "float"] = "source",
) -> dict[str, mx.array]:
    """Return `weights` with `{prefix}.embed_q` and `{prefix}.unembed_out` replaced by `{prefix}.kv_b_proj`.

    The inverse of `split_kv_b_proj_weights`, and like it the dict that was handed in is changed and
    returned, or returned as it is where nothing is split. Each of embed_q [h, r, n] and unembed_out
    [h, v, r] is dense or quantized, on its own; kv_b_proj [h*(n+v), r] becomes:

    * "source", in the form of unembed_out: where that is quantized its rows go back as they are, and K is
      decoded, transposed and encoded in the same mode, bits and group size, which its width r always
      allows. The codes of K are then near those it once had, not the same. Where unembed_out is
      dense the result is dense, and if both were it is bit for bit what was split.
    * "float": dense in the dtype of unembed_out (of its scales when affine, bfloat16 in the block-float
      modes). From embed_q "float" this loses nothing.

    Raises ValueError, with `weights` as it was, when one of the two is missing, a shape or dtype does
    not fit the numbers, or a kv_b_proj is there already. Raises UsageError for another `kv_b`.
    """
    import mlx.core as mx

    if kv_b not in ("source", "float"):
        raise UsageError(f'kv_b = {kv_b!r}: it takes "source" or "float"')
    name, k_name, v_name = (f"{prefix}.{word}" for word in ("kv_b_proj", "embed_q", "unembed_out"))
    k_parts, v_parts = _parts(weights, k_name), _parts(weights, v_name)
    if not k_parts and not v_parts:
        return weights
    for this, other in ((v_name, k_name), (k_name, v_name)):
        if not _parts(weights, this):
            raise _error(f"{this}.weight", "missing", needed=f"beside {other} to make {name}")
    _refuse_both(weights, v_name, name)
    k_shape, v_shape = (num_heads, kv_lora_rank, qk_nope_head_dim), (num_heads, v_head_dim, kv_lora_rank)
    k_spec = _read(k_parts, k_name, _Layout(k_shape, "[num_heads, kv_lora_rank, qk_nope_head_dim]"))
    v_spec = _read(v_parts, v_name, _Layout(v_shape, "[num_heads, v_head_dim, kv_lora_rank]"))

    float_dtype = mx.bfloat16
    if v_spec is None or v_spec.mode == "affine":
        float_dtype = v_parts["weight" if v_spec is None else "scales"].dtype
    # From a quantized K straight into the dtype of V: one rounding.
    k = k_parts["weight"] if k_spec is None else dequantize(k_parts, k_spec, float_dtype)
    if v_spec is None or kv_b == "float":
        v = v_parts["weight"] if v_spec is None else dequantize(v_parts, v_spec)
        try:
            new = {f"{name}.weight": merge_kv_b(k, v)}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    else:
        # [h, r, n] -> [h, n, r], and the scales in the dtype of V's scales, for they become one array.
        rows_of_k = quantize(mx.contiguous(k.astype(float_dtype).swapaxes(-1, -2)), v_spec)
        new = {}
        for part, rows_of_v in with_biases(v_parts, v_spec).items():
            # [h, n, words] and [h, v, words] -> [h*(n+v), words]
            heads = mx.concatenate([rows_of_k[part], rows_of_v], axis=1)
            new[f"{name}.{part}"] = heads.reshape(-1, heads.shape[-1])

    return _replace(weights, (k_name, v_name), new)


def shard_mla_projections(attn: Any, group: mx.distributed.Group, num_heads_attr: str = "num_heads") -> None:
    """Return nothing: `attn` keeps the heads of this rank in embed_q, unembed_out and its head count.

    Of h heads and N ranks, rank i keeps h // N heads from i * (h // N) on. embed_q and unembed_out are
    (Quantized)MultiLinear; every parameter of theirs has heads on its first axis. The attribute
    `num_heads_attr` of `attn` ("num_attention_heads" in LongCat Flash) is divided by N. The other
    projections and the sum over ranks remain with the caller. What a model's `shard` in mlx-lm does.

    Raises ValueError, with `attn` as it was, when N does not divide the heads or the first axes are
    not as long as the attribute says. Without this check the first forward dies in a reshape.
    """
    import mlx.core as mx

    ranks, rank = group.size(), group.rank()
    num_heads = getattr(attn, num_heads_attr, None)
    owner = type(attn).__name__
    if not isinstance(num_heads, int):
        raise ValueError(f"{owner}.{num_heads_attr} is {num_heads!r}; the number of heads is needed")
    if num_heads % ranks != 0:
        raise ValueError(f"{owner}.{num_heads_attr} = {num_heads} heads cannot be shared by {ranks} ranks")
    modules = {"embed_q": attn.embed_q, "unembed_out": attn.unembed_out}
    for word, module in modules.items():
        for part, array in module.parameters().items():
            if array.shape[0] != num_heads:
                raise ValueError(
                    f"{owner}.{word}.{part} has {array.shape[0]} heads on its first axis, "
                    f"but {owner}.{num_heads_attr} = {num_heads} (sharded already?)"
                )

    start = rank * (num_heads // ranks)
    stop = start + num_heads // ranks
    for module in modules.values():
        # A slice alone would keep the heads of all ranks in memory; a copy does not.
        module.apply(lambda array: mx.contiguous(array[start:stop]))
    setattr(attn, num_heads_attr, num_heads // ranks)


@dataclass(frozen=True)
class _Layout:
    """The shape a weight must have, and how it follows from the names in config.json."""

    shape: tuple[int, ...]
    formula: str

    def __str__(self) -> str:
        return f"{self.formula} = {list(self.shape)}"

    def unlike(self, name: str, array: mx.array) -> ValueError:
        """Return the error for an array of another shape."""
        return _error(name, "the shape does not fit the config", f"{self}", f"{list(array.shape)}")


def _kv_b_layout(
    num_heads: int, qk_nope_head_dim: int, v_head_dim: int, kv_lora_rank: int | None = None
) -> _Layout:
    """Return the layout of a fused kv_b [h*(n+v), r]; that of the first axis alone where r is not given."""
    names = "num_heads * (qk_nope_head_dim + v_head_dim)"
    numbers = f"{num_heads} * ({qk_nope_head_dim} + {v_head_dim})"
    rows = num_heads * (qk_nope_head_dim + v_head_dim)
    # Each factor is checked, for two negative ones would pass as a product.
    if min(num_heads, qk_nope_head_dim, v_head_dim) < 1:
        raise ValueError(f"{names} = {numbers}: each must be 1 or more")
    if kv_lora_rank is None:
        return _Layout((rows,), f"rows {names} = {numbers}")
    return _Layout((rows, kv_lora_rank), f"[{names}, kv_lora_rank] = [{numbers}, {kv_lora_rank}]")


def _parts(weights: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    return {part: weights[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in weights}


def _read(parts: Mapping[str, mx.array], name: str, layout: _Layout) -> QuantSpec | None:
    """Return the quantization of a weight, None when it is dense; ValueError when its parts do not fit."""
    import mlx.core as mx

    subject = f"{name}.weight"
    if "weight" not in parts:
        raise _error(subject, "missing", needed=f"beside {', '.join(f'{name}.{part}' for part in parts)}")
    weight, *rest = parts.values()
    if not rest:
        if not mx.issubdtype(weight.dtype, mx.floating):
            cause = "packed by MLX it needs its scales; in any other format it must be decoded first"
            raise _error(subject, f"{_dtype(weight)} without {name}.scales", "a float dtype", cause=cause)
        if weight.shape != layout.shape:
            raise layout.unlike(subject, weight)
        return None

    if "scales" not in parts:
        raise _error(f"{name}.scales", "missing", needed=f"beside {name}.biases")
    if weight.dtype != mx.uint32:
        raise _error(subject, f"{_dtype(weight)} beside {name}.scales", "uint32, the packed weight of MLX")
    *rows, width = layout.shape
    if list(weight.shape[:-1]) != rows:
        raise layout.unlike(subject, weight)
    scales = parts["scales"]
    if scales.shape[:-1] != weight.shape[:-1]:
        raise _error(
            f"{name}.scales",
            "the shape does not fit the weight's",
            f"[{', '.join(map(str, rows))}, groups] beside the weight {list(weight.shape)}",
            f"{list(scales.shape)}",
        )
    in_uint8 = scales.dtype == mx.uint8
    if not in_uint8 and not mx.issubdtype(scales.dtype, mx.floating):
        raise _error(f"{name}.scales", f"{_dtype(scales)} scales", "a float dtype, or uint8 (block float)")
    try:
        spec = infer_spec(
            width=width, packed_width=weight.shape[-1], groups=scales.shape[-1], scales_are_uint8=in_uint8
        )
    except ValueError as error:
        raise _error(subject, "no quantization of MLX fits its parts", f"{layout}", f"{error}") from error
    if "biases" in parts:
        biases = parts["biases"]
        if not spec.has_biases:
            raise _error(f"{name}.biases", f"biases beside the scales of {spec}", "none")
        if biases.shape != scales.shape or biases.dtype != scales.dtype:
            raise _error(
                f"{name}.biases",
                "unlike the scales",
                f"{_dtype(scales)} {list(scales.shape)}",
                f"{_dtype(biases)} {list(biases.shape)}",
            )
    return spec


def _refuse_both(weights: Mapping[str, mx.array], read: str, written: str) -> None:
    """Raise ValueError when the dict holds the tensor to be written beside the one to be read."""
    for part in _parts(weights, written):
        cause = f"one of the two is left over, and writing {written} would drop it unseen"
        raise _error(f"{written}.{part}", f"stored beside {read}", cause=cause)


def _replace(
    weights: dict[str, mx.array], olds: Iterable[str], news: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """Return the very dict, with the parts of the tensors `olds` popped and `news` stored."""
    for old in olds:
        for part in _PARTS:
            weights.pop(f"{old}.{part}", None)
    weights.update(news)
    return weights


def _indivisible(name: str, spec: QuantSpec, qk_nope_head_dim: int) -> ValueError:
    # The largest group that divides costs the fewest scales.
    groups = [group for group in MODES["affine"][1] if qk_nope_head_dim % group == 0]
    other = f"embed_q=QuantSpec(bits={spec.bits}, group_size={max(groups)}) or " if groups else ""
    return _error(
        f"{name}.weight",
        f"its K part cannot be encoded as {spec} in embed_q",
        f"a group size that divides qk_nope_head_dim = {qk_nope_head_dim}",
        f"group size {spec.group_size}",
        f'pass {other}embed_q="float"',
    )


def _mismatch(embed_q: mx.array, unembed_out: mx.array, needed: str) -> ValueError:
    found = " and ".join(f"{_dtype(array)} {list(array.shape)}" for array in (embed_q, unembed_out))
    return _error("embed_q and unembed_out", "do not fit together", needed, found)


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _error(subject: str, what: str, needed: str = "", found: str = "", cause: str = "") -> ValueError:
    return ValueError(str(Problem(subject, what, needed, found, cause)))
