"""The fused kv_b projection split and merged in a dict of weights, for model files.

A codec says what the stored tensors are, and steps of the engine make the new ones. Axis letters are those
of `mla`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mla_tools.codecs import Claim, Dense, Module, TargetCodec, stored_as
from mla_tools.codecs.mlx_quantized import claim
from mla_tools.errors import Problem, UsageError
from mla_tools.mla import Layout, kv_b_layout, merge_kv_b
from mla_tools.ops import MergeKvB, Op, Same, SplitKvB, SwapLastAxes
from mla_tools.quantization import MODES, QuantSpec
from mla_tools.spec import Spec, spec_of
from mla_tools.steps import Source, Step, Target, made_by
from mla_tools.transform import whole

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["merge_kv_b_proj_weights", "split_kv_b_proj_weights"]

# The stored parts of one MLX weight. A dense weight has the first alone.
_PARTS = ("weight", "scales", "biases")


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
    name, k_name, v_name = _names(prefix)
    if not _parts(weights, name):
        return weights
    for other in (k_name, v_name):
        _refuse_both(weights, name, other)
    source = _claim(weights, name, kv_b_layout(num_heads, qk_nope_head_dim, v_head_dim, kv_lora_rank))

    op = SplitKvB(qk_nope_head_dim, v_head_dim)
    k, v = op.infer([source.spec])
    own = _quantization(source)
    wanted = own if own is None or embed_q == "source" else None if embed_q == "float" else embed_q
    if wanted is not None and not wanted.divides(qk_nope_head_dim):
        raise _indivisible(name, wanted, qk_nope_head_dim)
    targets = (
        _target(op, 0, [source], k_name, k, wanted),
        _target(op, 1, [source], v_name, v, own),
    )
    return _replace(weights, (name,), whole(Step(op, (source,), targets), weights))


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
    if kv_b not in ("source", "float"):
        raise UsageError(f'kv_b = {kv_b!r}: it takes "source" or "float"')
    name, k_name, v_name = _names(prefix)
    held = {other: _parts(weights, other) for other in (k_name, v_name)}
    if not any(held.values()):
        return weights
    for this, other in ((v_name, k_name), (k_name, v_name)):
        if not held[this]:
            raise _error(f"{this}.weight", "missing", needed=f"beside {other} to make {name}")
    _refuse_both(weights, v_name, name)
    h, n, v, r = num_heads, qk_nope_head_dim, v_head_dim, kv_lora_rank
    k_layout = Layout((h, r, n), "[num_heads, kv_lora_rank, qk_nope_head_dim]")
    v_layout = Layout((h, v, r), "[num_heads, v_head_dim, kv_lora_rank]")
    of_k, of_v = _claim(weights, k_name, k_layout), _claim(weights, v_name, v_layout)

    wanted = _quantization(of_v)
    if wanted is None or kv_b == "float":
        new = _merged_floats(weights, name, of_k, of_v, MergeKvB(n, v))
    else:
        new = _merged_rows(weights, name, of_k, of_v, wanted)
    return _replace(weights, (k_name, v_name), new)


def _merged_floats(
    weights: Mapping[str, mx.array], name: str, of_k: Source, of_v: Source, op: MergeKvB
) -> dict[str, mx.array]:
    """Return kv_b_proj in the dtype of V; ValueError for a dense K in another."""
    dtype = of_v.spec.dtype
    if not of_k.codec.quantized and of_k.spec.dtype is not dtype:
        found = f"{of_k.label} in {of_k.spec.dtype.name} and {of_v.label} in {dtype.name}"
        raise _error(name, "its two halves do not fit together", "one dtype", found)
    # From a quantized K straight into the dtype of V: one rounding.
    (spec,) = op.infer([of_k.spec, of_v.spec])
    target = _target(op, 0, [of_k, of_v], name, Spec(spec.shape, dtype), None)
    return whole(Step(op, (of_k, of_v), (target,)), weights)


def _merged_rows(
    weights: Mapping[str, mx.array], name: str, of_k: Source, of_v: Source, wanted: QuantSpec
) -> dict[str, mx.array]:
    """Return kv_b_proj with the packed rows of V as they are, and K encoded in the same way."""
    parts = []
    for op, source in ((SwapLastAxes(), of_k), (Same(), of_v)):
        (spec,) = op.infer([source.spec])
        # The scales of both in the dtype of V's, for they become one array.
        target = _target(op, 0, [source], name, Spec(spec.shape, of_v.spec.dtype), wanted)
        parts.append(whole(Step(op, (source,), (target,)), weights))
    k, v = parts
    # [h, n, words] and [h, v, words] -> [h*(n+v), words]
    return {part: merge_kv_b(k[part].swapaxes(-1, -2), v[part]) for part in v}


def _names(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.kv_b_proj", f"{prefix}.embed_q", f"{prefix}.unembed_out"


def _parts(weights: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    return {part: weights[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in weights}


def _claim(weights: Mapping[str, mx.array], name: str, layout: Layout) -> Source:
    """Return the tensor that the parts of a weight are; ValueError when they do not fit."""
    arrays = _parts(weights, name)
    specs = {part: spec for part, array in arrays.items() if (spec := spec_of(array)) is not None}
    text = ", ".join(f"{part} {specs.get(part, array.dtype)}" for part, array in arrays.items())
    if "weight" not in arrays:
        raise _error(f"{name}.weight", "missing", f"{layout}, beside {text}")
    weight = specs.get("weight")
    try:
        # What no checkpoint holds is not left out unseen.
        claims = claim(Module(specs, layout.shape[-1], {})) if len(specs) == len(arrays) else []
    except ValueError as error:
        raise _error(name, "its stored tensors do not fit together", f"{layout}", f"{error}") from error
    if not claims and len(arrays) == 1 and weight is not None and weight.dtype.kind == "float":
        claims = [Claim("weight", weight, Dense(weight.dtype), {"weight": "weight"})]
    if not claims:
        needed = f"floats alone, or U32 codes with MLX's scales, of {layout}"
        cause = "a weight in any other format must be decoded first"
        raise _error(name, "its stored tensors are no weight of MLX", needed, text, cause)
    (found,) = claims
    if found.spec.shape != layout.shape:
        there = f"{list(found.spec.shape)} in {found.codec.name}"
        raise _error(f"{name}.weight", "the shape does not fit the config", f"{layout}", there)
    return Source(f"{name}.weight", found.spec, found.codec, tuple(found.parts))


def _quantization(source: Source) -> QuantSpec | None:
    """Return the mode, bits and group size in which a tensor is quantized; None for floats."""
    native = source.codec.native
    return None if native is None else native.spec


def _target(
    op: Op, output: int, sources: Sequence[Source], name: str, spec: Spec, wanted: QuantSpec | None
) -> Target:
    """Return an output of an op as it is stored: in the quantization that is wanted, or (None) in floats."""
    codec: TargetCodec = Dense(spec.dtype)
    if wanted is not None:
        codec, dtype = stored_as(wanted, spec.dtype, [source.codec for source in sources], None)
        spec = Spec(spec.shape, dtype)
    return made_by(op, output, sources, f"{name}.weight", spec, codec)


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


def _error(subject: str, what: str, needed: str = "", found: str = "", cause: str = "") -> ValueError:
    return ValueError(str(Problem(subject, what, needed, found, cause)))
