"""`kv_b` against mlx-lm's own `sanitize`, bit for bit, and against the layout's definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attention import DTYPES, MODES, H, N, R, V, Weights, random, same_weights, tiny_deepseek
from support import same

from mla_tools.errors import UsageError
from mla_tools.kv_b import merge_kv_b_proj_weights, split_kv_b_proj_weights
from mla_tools.mla import merge_kv_b
from mla_tools.quantization import QuantSpec, dequantize, quantize

PREFIX = "model.layers.0.self_attn"
SIZES = {"num_heads": H, "qk_nope_head_dim": N, "v_head_dim": V, "kv_lora_rank": R}

FLOATS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[-1])


def named(name: str, parts: Weights) -> Weights:
    return {f"{PREFIX}.{name}.{part}": array for part, array in parts.items()}


def parts_of(weights: Weights, name: str) -> Weights:
    start = f"{PREFIX}.{name}."
    return {key.removeprefix(start): array for key, array in weights.items() if key.startswith(start)}


def fused(spec: QuantSpec | None, *, biases: bool = True, dtype: mx.Dtype = mx.bfloat16) -> Weights:
    """Return the parts of a random kv_b_proj."""
    dense = random(H * (N + V), R, dtype=dtype)
    parts = {"weight": dense} if spec is None else quantize(dense, spec)
    return {part: array for part, array in parts.items() if biases or part != "biases"}


def relative_error(array: mx.array, truth: mx.array) -> float:
    return (mx.linalg.norm(array - truth) / mx.linalg.norm(truth)).item()


# ---- against mlx-lm


@pytest.mark.parametrize(
    "spec",
    [None, *(QuantSpec(bits=bits, group_size=g) for bits in (2, 3, 4, 5, 6, 8) for g in (32, 64))],
    ids=str,
)
@FLOATS
def test_embed_q_from_source_is_what_mlx_lm_makes_of_it(spec: QuantSpec | None, dtype: mx.Dtype) -> None:
    source = named("kv_b_proj", fused(spec, dtype=dtype))
    theirs = tiny_deepseek().sanitize(dict(source))
    ours = split_kv_b_proj_weights(dict(source), PREFIX, **SIZES)

    assert ours.keys() == theirs.keys()
    # Quantized V is where we differ on purpose: mlx-lm quantizes it a second time.
    exact = [name for name in ours if spec is None or "embed_q" in name]
    assert all(same(ours[name], theirs[name]) for name in exact)
    assert len(exact) == (2 if spec is None else 3)


@pytest.mark.parametrize(
    ("spec", "biases"),
    [*((spec, True) for spec in MODES), (QuantSpec(), False), (QuantSpec(bits=8), False)],
    ids=lambda value: {True: "", False: "no-biases"}.get(value, str(value)),
)
@pytest.mark.parametrize("embed_q", ["source", "float", QuantSpec(bits=8, group_size=32)], ids=str)
def test_v_keeps_its_bits(spec: QuantSpec, biases: bool, embed_q: Any) -> None:
    source = fused(spec, biases=biases)
    split = split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **SIZES, embed_q=embed_q)
    v = parts_of(split, "unembed_out")

    assert v.keys() == {"weight", "scales"} | ({"biases"} if spec.has_biases else set())
    for part, array in source.items():
        rows = np.array(array.view({4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[array.dtype.size]))
        expected = rows.reshape(H, N + V, -1)[:, N:]
        assert v[part].dtype == array.dtype
        np.testing.assert_array_equal(np.array(v[part].view(mx.array(rows).dtype)), expected)
    if spec.has_biases and not biases:
        assert same(v["biases"], mx.zeros_like(v["scales"]))


@pytest.mark.parametrize("spec", MODES, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_k_follows_the_choice(spec: QuantSpec, dtype: mx.Dtype) -> None:
    source = fused(spec, dtype=dtype)
    decoded = mx.dequantize(*source.values(), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    k = mx.contiguous(decoded.reshape(H, N + V, R)[:, :N].swapaxes(1, 2))

    def split(**choice: Any) -> Weights:
        return parts_of(
            split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **SIZES, **choice), "embed_q"
        )

    other = QuantSpec("mxfp8") if spec.mode == "affine" else QuantSpec(bits=8, group_size=32)
    assert same_weights(split(embed_q="float"), {"weight": k})
    assert k.dtype == (dtype if spec.mode == "affine" else mx.bfloat16)
    for choice, expected in ((spec, spec), (other, other), ("source", spec)):
        parts = mx.quantize(k, expected.group_size, expected.bits, mode=expected.mode)
        names = ("weight", "scales", "biases")[: len(parts)]
        assert same_weights(split(embed_q=choice), dict(zip(names, parts, strict=True)))
    assert same_weights(split(), split(embed_q="source"))


def test_k_without_biases_decodes_with_zeros() -> None:
    source = fused(QuantSpec(), biases=False)
    zeros = source | {"biases": mx.zeros_like(source["scales"])}
    left, right = (
        split_kv_b_proj_weights(named("kv_b_proj", parts), PREFIX, **SIZES) for parts in (source, zeros)
    )
    assert same_weights(left, right)


def test_k_error() -> None:
    """The figures of the design page: 0.078 at the source's 4 bits, 0.0073 at 8 bits in groups of 32."""
    spec = QuantSpec()
    sizes = {"num_heads": 16, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512}
    source = quantize(random(16 * 256, 512), spec)
    truth = dequantize(source, spec, mx.float32).reshape(16, 256, 512)[:, :128].swapaxes(1, 2)

    def error(choice: Any, target: QuantSpec | None) -> float:
        weights = split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **sizes, embed_q=choice)
        parts = parts_of(weights, "embed_q")
        array = parts["weight"] if target is None else dequantize(parts, target, mx.float32)
        return relative_error(array.astype(mx.float32), truth)

    fine = QuantSpec(bits=8, group_size=32)
    assert 0.06 < error("source", spec) < 0.09
    assert error(fine, fine) < 0.009
    assert error("float", None) < 0.005


@pytest.mark.parametrize("embed_q", ["float", QuantSpec(), QuantSpec(bits=8, group_size=128)], ids=str)
def test_dense_stays_dense(embed_q: Any) -> None:
    source = named("kv_b_proj", fused(None))
    expected = split_kv_b_proj_weights(dict(source), PREFIX, **SIZES)
    assert same_weights(split_kv_b_proj_weights(dict(source), PREFIX, **SIZES, embed_q=embed_q), expected)
    assert {array.dtype for array in expected.values()} == {mx.bfloat16}


def test_the_dict_itself_is_changed_and_other_entries_stay() -> None:
    norm = mx.ones(3)
    weights = named("kv_b_proj", fused(QuantSpec())) | {
        f"{PREFIX}.norm.weight": norm,
        "model.layers.1.self_attn.kv_b_proj.weight": norm,
    }
    assert split_kv_b_proj_weights(weights, PREFIX, **SIZES) is weights
    assert not parts_of(weights, "kv_b_proj")
    assert weights[f"{PREFIX}.norm.weight"] is norm
    assert weights["model.layers.1.self_attn.kv_b_proj.weight"] is norm

    before = dict(weights)
    assert split_kv_b_proj_weights(weights, PREFIX, **SIZES) is weights
    assert weights == before


@pytest.mark.parametrize(
    ("spec", "biases"),
    [(None, True), (QuantSpec(), False), *((spec, True) for spec in MODES)],
    ids=lambda value: {True: "", False: "no-biases"}.get(value, str(value)),
)
@pytest.mark.parametrize("embed_q", ["source", "float", QuantSpec(bits=8, group_size=32)], ids=str)
def test_mlx_lm_loads_and_runs_the_result(spec: QuantSpec | None, biases: bool, embed_q: Any) -> None:
    source = fused(spec, biases=biases)
    weights = split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **SIZES, embed_q=embed_q)
    attn = tiny_deepseek().layers[0].self_attn
    if spec is not None:
        k_spec = {"source": spec, "float": None}.get(embed_q, embed_q)
        specs = {"embed_q": k_spec, "unembed_out": spec}
        nn.quantize(attn, class_predicate=lambda path, _: specs[path].config if specs.get(path) else False)
    for name in ("embed_q", "unembed_out"):
        getattr(attn, name).load_weights(list(parts_of(weights, name).items()), strict=True)

    kv_b = source["weight"] if spec is None else dequantize(source, spec)
    kv_b = kv_b.astype(mx.float32).reshape(H, N + V, R)
    query, latent = (random(1, H, 3, width, dtype=mx.float32, seed=width) for width in (N, R))
    tolerance = 0.25 if embed_q == "source" else 0.02
    assert relative_error(attn.embed_q(query), query @ kv_b[:, :N]) < tolerance
    assert relative_error(attn.unembed_out(latent), latent @ kv_b[:, N:].swapaxes(1, 2)) < 0.01


def test_float64_stays_float64() -> None:
    with mx.stream(mx.cpu):
        source = named("kv_b_proj", {"weight": fused(None)["weight"].astype(mx.float64)})
        split = split_kv_b_proj_weights(dict(source), PREFIX, **SIZES)
        assert {array.dtype for array in split.values()} == {mx.float64}
        assert same_weights(merge_kv_b_proj_weights(split, PREFIX, **SIZES), source)


# ---- refused


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda parts: {part: array for part, array in parts.items() if part not in names}


def change(part: str, edit: Callable[[mx.array], mx.array]) -> Callable[[Weights], Weights]:
    return lambda parts: parts | {part: edit(parts[part])}


ROWS = "[num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank] = [4 * (64 + 32), 128] = [384, 128]"


@pytest.mark.parametrize(
    ("spec", "edit", "subject", "texts"),
    [
        (None, change("weight", lambda w: w[:-1]), ".weight", (f"needed  {ROWS}", "found   [383, 128]")),
        (None, change("weight", lambda w: w[:, :-1]), ".weight", (f"needed  {ROWS}", "found   [384, 127]")),
        (None, change("weight", lambda w: w[0]), ".weight", (f"needed  {ROWS}", "found   [128]")),
        (
            None,
            change("weight", lambda w: w.view(mx.uint8)),
            "",
            ("found   weight U8 [384, 256]\n", "decoded"),
        ),
        (None, change("weight", lambda w: w.astype(mx.int32)), "", ("found   weight I32 [384, 128]\n",)),
        (
            None,
            change("weight", lambda w: w.astype(mx.complex64)),
            "",
            ("found   weight mlx.core.complex64\n",),
        ),
        (QuantSpec(), without("scales", "biases"), "", (f"scales, of {ROWS}\n", "weight U32 [384, 16]\n")),
        (
            QuantSpec(),
            without("weight"),
            ".weight",
            (f"missing\n  needed  {ROWS}, beside scales BF16 [384, 2], biases BF16 [384, 2]",),
        ),
        (
            QuantSpec(),
            without("scales"),
            "",
            (f"scales, of {ROWS}\n", "found   weight U32 [384, 16], biases BF16 [384, 2]\n"),
        ),
        (
            QuantSpec(),
            change("weight", lambda w: w.astype(mx.float16)),
            "",
            ("floats alone, or U32 codes", "found   weight F16 [384, 16], scales BF16 [384, 2], biases"),
        ),
        (
            QuantSpec(),
            lambda parts: {part: array[:-2] for part, array in parts.items()},
            ".weight",
            (f"needed  {ROWS}", "found   [382, 128] in affine 4-bit g64"),
        ),
        (
            QuantSpec(),
            change("scales", lambda s: s[:-1]),
            "",
            (ROWS, "scales BF16 [383, 2] do not belong to weight U32 [384, 16]: the rows differ"),
        ),
        (
            QuantSpec(),
            change("scales", lambda s: s[:, 0]),
            "",
            ("scales BF16 [384] do not belong to weight U32 [384, 16]",),
        ),
        (
            QuantSpec(),
            lambda parts: {part: array.astype(mx.uint32) for part, array in parts.items()},
            "",
            (ROWS, "scales are U32, which no MLX mode uses"),
        ),
        (
            QuantSpec(),
            change("weight", lambda w: w[:, :-1]),
            "",
            (ROWS, "rows of 128 elements stored as 15 uint32 words with 2 float scales"),
        ),
        (
            QuantSpec("mxfp4"),
            change("scales", lambda s: s[:, :2]),
            "",
            ("rows of 128 elements stored as 16 uint32 words with 2 uint8 scales",),
        ),
        (
            QuantSpec(),
            change("biases", lambda b: b[:, :1]),
            "",
            ("biases BF16 [384, 1] differ from scales BF16 [384, 2]",),
        ),
        (
            QuantSpec(),
            change("biases", lambda b: b.astype(mx.float32)),
            "",
            ("biases F32 [384, 2] differ from scales BF16 [384, 2]",),
        ),
        (
            QuantSpec(),
            change("biases", lambda b: b.astype(mx.complex64)),
            "",
            ("found   weight U32 [384, 16], scales BF16 [384, 2], biases mlx.core.complex64\n",),
        ),
        (
            QuantSpec("mxfp8"),
            lambda parts: parts | {"biases": parts["scales"]},
            "",
            ("scales in uint8 belong to a mode without biases, but there are biases",),
        ),
    ],
    ids=[
        "dense-rows",
        "dense-latent",
        "dense-axes",
        "fp8-bytes",
        "integers",
        "complex",
        "no-scales",
        "no-weight",
        "biases-alone",
        "float-beside-scales",
        "packed-rows",
        "scales-rows",
        "scales-axes",
        "scales-dtype",
        "packed-latent",
        "mxfp4-groups",
        "biases-shape",
        "biases-dtype",
        "biases-complex",
        "biases-mxfp8",
    ],
)
def test_a_part_that_does_not_fit_is_refused(
    spec: QuantSpec | None,
    edit: Callable[[Weights], Weights],
    subject: str,
    texts: tuple[str, ...],
) -> None:
    weights = named("kv_b_proj", edit(fused(spec)))
    before = dict(weights)
    with pytest.raises(ValueError) as caught:
        split_kv_b_proj_weights(weights, PREFIX, **SIZES)
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}.kv_b_proj{subject}: ")
    assert all(text in message for text in texts), message
    assert weights == before


@pytest.mark.parametrize(
    ("n", "embed_q", "needles"),
    [
        (96, "source", ("affine 4-bit g64", "QuantSpec(bits=4, group_size=32)", 'embed_q="float"')),
        (
            64,
            QuantSpec(bits=8, group_size=128),
            ("affine 8-bit g128", "QuantSpec(bits=8, group_size=64)", "found   group size 128"),
        ),
        (80, QuantSpec("mxfp8"), ("mxfp8", "qk_nope_head_dim = 80", 'pass embed_q="float"')),
    ],
    ids=["source", "spec", "no-group-fits"],
)
def test_a_group_that_does_not_divide_is_refused(n: int, embed_q: Any, needles: tuple[str, ...]) -> None:
    sizes = SIZES | {"qk_nope_head_dim": n}
    weights = named("kv_b_proj", quantize(random(H * (n + V), R), QuantSpec()))
    before = dict(weights)
    with pytest.raises(ValueError) as caught:
        split_kv_b_proj_weights(weights, PREFIX, **sizes, embed_q=embed_q)
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}.kv_b_proj.weight: its K part cannot be encoded as ")
    assert f"a group size that divides qk_nope_head_dim = {n}" in message
    assert all(needle in message for needle in needles), message
    assert weights == before
    assert f"{PREFIX}.embed_q.weight" in split_kv_b_proj_weights(weights, PREFIX, **sizes, embed_q="float")


@pytest.mark.parametrize("name", ["embed_q", "unembed_out"])
def test_both_layouts_in_one_dict_are_refused(name: str) -> None:
    weights = named("kv_b_proj", fused(None)) | {f"{PREFIX}.{name}.weight": mx.zeros((1, 1, 1))}
    before = dict(weights)
    with pytest.raises(ValueError, match=rf"{name}\.weight: stored beside .*kv_b_proj\n"):
        split_kv_b_proj_weights(weights, PREFIX, **SIZES)
    assert weights == before


@pytest.mark.parametrize("call", [{"embed_q": "8"}, {"embed_q": None}], ids=str)
def test_another_embed_q_is_refused(call: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match='it takes "source", "float" or a QuantSpec'):
        split_kv_b_proj_weights({}, PREFIX, **SIZES, **call)


# ---- and back


@FLOATS
@pytest.mark.parametrize("kv_b", ["source", "float"])
def test_merge_undoes_a_dense_split(dtype: mx.Dtype, kv_b: Any) -> None:
    source = named("kv_b_proj", fused(None, dtype=dtype))
    split = split_kv_b_proj_weights(dict(source), PREFIX, **SIZES)
    merged = merge_kv_b_proj_weights(split, PREFIX, **SIZES, kv_b=kv_b)
    assert merged is split
    assert same_weights(merged, source)
    assert merge_kv_b_proj_weights(merged, PREFIX, **SIZES) is merged
    assert same_weights(merged, source)


@pytest.mark.parametrize("spec", [*MODES, QuantSpec(bits=8, group_size=32)], ids=str)
@pytest.mark.parametrize("embed_q", ["source", "float", QuantSpec(bits=8, group_size=32)], ids=str)
def test_merge_puts_the_rows_of_v_back_as_they_are(spec: QuantSpec, embed_q: Any) -> None:
    source = fused(spec)
    split = split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **SIZES, embed_q=embed_q)
    k_parts = parts_of(split, "embed_q")
    merged = parts_of(merge_kv_b_proj_weights(split, PREFIX, **SIZES), "kv_b_proj")

    assert split.keys() == named("kv_b_proj", source).keys()
    k_spec = {"source": spec, "float": None}.get(embed_q, embed_q)
    dtype = mx.bfloat16
    k = k_parts["weight"] if k_spec is None else dequantize(k_parts, k_spec, dtype)
    rows_of_k = mx.quantize(k.swapaxes(1, 2), spec.group_size, spec.bits, mode=spec.mode)
    for expected, (part, array) in zip(rows_of_k, source.items(), strict=True):
        heads, theirs = (parts[part].reshape(H, N + V, -1) for parts in (merged, source))
        assert merged[part].shape == array.shape
        assert same(mx.contiguous(heads[:, N:]), mx.contiguous(theirs[:, N:]))
        assert same(mx.contiguous(heads[:, :N]), mx.contiguous(expected))


@pytest.mark.parametrize("spec", MODES, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_merge_to_float_loses_nothing_from_embed_q_float(spec: QuantSpec, dtype: mx.Dtype) -> None:
    source = fused(spec, dtype=dtype)
    split = split_kv_b_proj_weights(named("kv_b_proj", source), PREFIX, **SIZES, embed_q="float")
    merged = merge_kv_b_proj_weights(split, PREFIX, **SIZES, kv_b="float")
    decoded = mx.dequantize(*source.values(), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    assert same_weights(merged, named("kv_b_proj", {"weight": decoded}))


def test_merge_takes_k_and_v_in_different_forms() -> None:
    k, v = random(H, R, N), random(H, V, R, seed=1).astype(mx.float32)
    k_spec = QuantSpec("mxfp8")
    parts = quantize(k, k_spec)
    weights = named("embed_q", parts) | named("unembed_out", {"weight": v})
    merged = merge_kv_b_proj_weights(weights, PREFIX, **SIZES)
    expected = merge_kv_b(dequantize(parts, k_spec, mx.float32), v)
    assert same_weights(merged, named("kv_b_proj", {"weight": expected}))


def test_merge_of_float32_k_into_bfloat16_v_keeps_the_dtype_of_v() -> None:
    spec = QuantSpec()
    k, v = random(H, R, N, dtype=mx.float32), quantize(random(H, V, R), spec)
    weights = named("embed_q", {"weight": k}) | named("unembed_out", v)
    merged = parts_of(merge_kv_b_proj_weights(weights, PREFIX, **SIZES), "kv_b_proj")
    assert (merged["scales"].dtype, merged["biases"].dtype) == (mx.bfloat16, mx.bfloat16)


def test_merge_without_biases_writes_zeros_for_v() -> None:
    split = split_kv_b_proj_weights(named("kv_b_proj", fused(QuantSpec())), PREFIX, **SIZES)
    del split[f"{PREFIX}.unembed_out.biases"]
    biases = merge_kv_b_proj_weights(split, PREFIX, **SIZES)[f"{PREFIX}.kv_b_proj.biases"]
    heads = biases.reshape(H, N + V, -1)
    assert not mx.any(heads[:, N:])
    assert mx.any(heads[:, :N])


K, O = "embed_q", "unembed_out"


@pytest.mark.parametrize(
    ("k", "v", "extra", "text"),
    [
        ((H, R, N), None, {}, f"{PREFIX}.{O}.weight: missing\n  needed  beside {PREFIX}.{K} to make"),
        (None, (H, V, R), {}, f"{PREFIX}.{K}.weight: missing\n  needed  beside {PREFIX}.{O} to make"),
        (
            (H, R, 63),
            (H, V, R),
            {},
            f"{PREFIX}.{K}.weight: the shape does not fit the config\n"
            "  needed  [num_heads, kv_lora_rank, qk_nope_head_dim] = [4, 128, 64]\n  found   [4, 128, 63]",
        ),
        (
            (H, R, N),
            (2, V, R),
            {},
            f"{PREFIX}.{O}.weight: the shape does not fit the config\n"
            "  needed  [num_heads, v_head_dim, kv_lora_rank] = [4, 32, 128]\n  found   [2, 32, 128]",
        ),
        (
            (H, R, N),
            (H, V, R),
            {f"{PREFIX}.kv_b_proj.weight": mx.zeros(1)},
            f"{PREFIX}.kv_b_proj.weight: stored beside {PREFIX}.{O}",
        ),
        (
            (H, R, N),
            (H, V, R),
            {f"{PREFIX}.{O}.weight": mx.zeros((H, V, R), mx.float16)},
            f"{PREFIX}.kv_b_proj: its two halves do not fit together\n  needed  one dtype\n"
            f"  found   {PREFIX}.{K} in F32 and {PREFIX}.{O} in F16",
        ),
    ],
    ids=["no-v", "no-k", "k-shape", "v-shape", "both", "dtypes"],
)
def test_merge_of_weights_refuses(k: Any, v: Any, extra: Weights, text: str) -> None:
    weights = {f"{PREFIX}.{name}.weight": mx.zeros(shape) for name, shape in ((K, k), (O, v)) if shape}
    weights |= extra
    before = dict(weights)
    with pytest.raises(ValueError) as caught:
        merge_kv_b_proj_weights(weights, PREFIX, **SIZES)
    assert text in str(caught.value)
    assert weights == before


def test_merge_leaves_the_dict_as_it_was_when_a_part_does_not_fit() -> None:
    split = split_kv_b_proj_weights(named("kv_b_proj", fused(QuantSpec())), PREFIX, **SIZES)
    split[f"{PREFIX}.unembed_out.scales"] = split[f"{PREFIX}.unembed_out.scales"][:2]
    before = dict(split)
    with pytest.raises(
        ValueError, match=r"unembed_out: its stored tensors do not fit together\n.* = \[4, 32, 128\]"
    ):
        merge_kv_b_proj_weights(split, PREFIX, **SIZES)
    assert split == before


def test_another_kv_b_is_refused() -> None:
    with pytest.raises(UsageError, match='kv_b = \'dense\': it takes "source" or "float"'):
        merge_kv_b_proj_weights({}, PREFIX, **SIZES, kv_b="dense")  # type: ignore[arg-type]
