"""`sanitize` over a dict of arrays against the `sanitize` of mlx-lm's own classes, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import support
from mlx_lm.utils import load_model
from pairs import pairs, product
from support import loaded, mlx_lm_reads, same

import mla_tools
from mla_tools import CheckpointError, MlaToolsError, Options, QuantSpec, transform
from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.codecs import FORMATS
from mla_tools.convert import plan
from mla_tools.kernels import decode_e4m3
from mla_tools.ops import SplitKvB
from mla_tools.plan import make_steps
from mla_tools.samples import sample_config
from mla_tools.spec import spec_of
from mla_tools.verify.child import model_classes

Weights = dict[str, mx.array]
Config = dict[str, Any]
Sample = Callable[..., tuple[Weights, Config]]

# The families whose class wants kv_b_proj in two.
SPLIT = [
    family
    for family in MODEL_TYPES
    if any(isinstance(route.op, SplitKvB) for route in table_of(sample_config(family))[1].routes)
]
# mlx-lm's kimi_vl has the modules of its kimi_k25, but a sanitize that leaves kv_b_proj in one piece.
SANITIZED_AS = {"kimi_vl": "kimi_k25"}
each_family = pytest.mark.parametrize("family", MODEL_TYPES)
each_split = pytest.mark.parametrize("family", SPLIT)

SPECS = {
    "affine": QuantSpec(),
    "affine_8_32": QuantSpec(bits=8, group_size=32),
    "mxfp4": QuantSpec("mxfp4"),
    "mxfp8": QuantSpec("mxfp8"),
    "nvfp4": QuantSpec("nvfp4"),
}


@pytest.fixture
def sample() -> Sample:
    """Return weights and config as mlx-lm hands them to a class that knows no MTP layer but number 61."""

    def load(family: str, fmt: str = "bf16") -> tuple[Weights, Config]:
        folder = support.sample(family, fmt)
        weights = loaded(folder)
        config = json.loads((folder / "config.json").read_text())
        config = {**(MODEL_TYPES[family].defaults or {}), **config}
        config.setdefault("model_type", MODEL_TYPES[family].model_type)
        return {name: a for name, a in weights.items() if not name.startswith("model.layers.4.")}, config

    return load


def classes(config: Config) -> tuple[Any, Any]:
    """Return the classes that the output of a hub's config is for."""
    return model_classes({**config, "model_type": MODEL_TYPES[config["model_type"]].model_type})


def model_of(config: Config) -> Any:
    model_class, args_class = classes(config)
    return model_class(args_class.from_dict(config))


def assert_same(got: Weights, wanted: Weights) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert same(got[name], wanted[name]), name


def quantized(weights: Weights, spec: QuantSpec) -> Weights:
    """Return weights as old converters left them: every matrix quantized as it lies, kv_b_proj too."""
    made: Weights = {}
    for name, array in weights.items():
        is_router = name.endswith(("mlp.gate.weight", "moe.gate.weight", "classifier.weight"))
        if array.ndim != 2 or not name.endswith(".weight") or array.shape[-1] % spec.group_size or is_router:
            made[name] = array
            continue
        parts = mx.quantize(array, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        for part, value in zip(("weight", "scales", "biases"), parts, strict=False):
            made[name.removesuffix("weight") + part] = value
    return made


def load_strictly(weights: Weights, config: Config, spec: QuantSpec, **others: QuantSpec) -> Any:
    """Load weights into mlx-lm's class as mlx_lm.load does, and return the model."""
    model = model_of(config)

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return dict(others.get(path.rpartition(".")[2], spec).config)

    nn.quantize(model, class_predicate=how)
    model.load_weights(list(weights.items()), strict=True)
    return model


# --- floats ------------------------------------------------------------------------------------------


READ = [name for name in MODEL_TYPES if mlx_lm_reads(name)]
FLOATS = ["bf16", "f32"]


@pytest.mark.parametrize(("family", "fmt"), product(READ, FLOATS, pairs(READ, FLOATS, times=1)))
def test_dense_equals_mlx_lms_own_sanitize(family: str, fmt: str, sample: Sample) -> None:
    weights, config = sample(family, fmt)
    model = model_of({**config, "model_type": SANITIZED_AS.get(family, config["model_type"])})
    # A class without a sanitize takes the weights as they are.
    theirs = getattr(model, "sanitize", dict)
    assert_same(mla_tools.sanitize(weights, config), theirs(dict(weights)))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "kimi_k2"])
def test_fp8_equals_mlx_lms_own_sanitize(family: str, sample: Sample) -> None:
    weights, config = sample(family, "fp8")
    assert any(array.dtype == mx.uint8 for array in weights.values())
    # A class without a sanitize takes the weights as they are.
    theirs = getattr(model_of(config), "sanitize", dict)
    assert_same(mla_tools.sanitize(weights, config), theirs(dict(weights)))


@each_family
def test_fp8_of_every_family_loads_strictly(family: str, sample: Sample) -> None:
    weights, config = sample(family, "fp8")
    made = mla_tools.sanitize(weights, config)
    model_of(config).load_weights(list(made.items()), strict=True)
    dtypes = {array.dtype for name, array in made.items() if not name.endswith("tid2eid")}
    assert dtypes <= {mx.bfloat16, mx.float32}


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash"])
def test_mtp_layers_are_left_out(family: str, sample: Sample) -> None:
    whole = loaded(support.sample(family))
    weights, config = sample(family)
    is_mtp = [name for name in whole if name.startswith(("model.layers.4.", "model.mtp."))]
    assert is_mtp
    assert_same(mla_tools.sanitize(whole, config), mla_tools.sanitize(weights, config))


@each_family
def test_a_model_args_does_as_well_as_a_dict(family: str, sample: Sample) -> None:
    weights, config = sample(family)
    _, args_class = classes(config)
    assert_same(
        mla_tools.sanitize(weights, args_class.from_dict(config)), mla_tools.sanitize(weights, config)
    )


@each_family
def test_what_is_sanitized_already_stays_as_it_is(family: str, sample: Sample) -> None:
    weights, config = sample(family)
    once = mla_tools.sanitize(weights, config)
    assert_same(mla_tools.sanitize(once, config), once)


@pytest.mark.parametrize(
    "keys",
    [
        {"torch_dtype": "float16"},
        {"dtype": "float16"},
        {"text_config": {"dtype": "float16"}},
    ],
    ids=["torch_dtype", "dtype", "text_config"],
)
def test_dtypes_are_kept_whatever_the_config_says(keys: Config, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    del config["torch_dtype"]
    made = mla_tools.sanitize(weights, {**config, **keys})
    assert {array.dtype for array in made.values()} == {array.dtype for array in weights.values()}
    assert mx.float16 not in {array.dtype for array in made.values()}


# --- packed ------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("mode", SPECS)
def test_packed_weights_load_strictly(family: str, mode: str, sample: Sample) -> None:
    weights, config = sample(family)
    spec = SPECS[mode]
    made = mla_tools.sanitize(quantized(weights, spec), config)
    load_strictly(made, config, spec)
    assert any(array.dtype == mx.uint32 for array in made.values())


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "glm4_moe_lite", "longcat_flash"])
def test_packed_experts_equal_mlx_lms_own_sanitize(family: str, sample: Sample) -> None:
    weights, config = sample(family)
    packed = quantized(weights, QuantSpec())
    got, wanted = mla_tools.sanitize(packed, config), model_of(config).sanitize(dict(packed))
    assert got.keys() == wanted.keys()
    for name in wanted:
        # mlx-lm decodes and encodes V again, which costs precision: there ours is the better one.
        if ".unembed_out." not in name:
            assert same(got[name], wanted[name]), name


@each_split
@pytest.mark.parametrize("mode", SPECS)
def test_rows_of_v_keep_their_bits(family: str, mode: str, sample: Sample) -> None:
    weights, config = sample(family)
    packed = quantized(weights, SPECS[mode])
    made = mla_tools.sanitize(packed, config)
    numbers = config.get("text_config", config)
    heads, nope = numbers["num_attention_heads"], numbers["qk_nope_head_dim"]
    found = 0
    for name, array in packed.items():
        before, is_kv_b, part = name.partition(".kv_b_proj.")
        if is_kv_b and f"{before}.unembed_out.{part}" in made:
            rows = array.reshape(heads, -1, array.shape[-1])[:, nope:]
            assert same(made[f"{before}.unembed_out.{part}"], mx.contiguous(rows)), name
            found += 1
    assert found >= 2


@pytest.mark.parametrize("mode", SPECS)
def test_the_k_half_is_encoded_as_asked(mode: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    spec, fine = SPECS[mode], QuantSpec(bits=8, group_size=32)
    packed = quantized(weights, spec)
    name = "model.layers.2.self_attn.embed_q"
    source = mla_tools.sanitize(packed, config, embed_q="source")
    floats = mla_tools.sanitize(packed, config, embed_q="float")
    eight = mla_tools.sanitize(packed, config, embed_q=fine)
    dense = mla_tools.sanitize(weights, config)[f"{name}.weight"]

    assert f"{name}.scales" not in floats
    fused = "model.layers.2.self_attn.kv_b_proj"
    parts = [packed[f"{fused}.{p}"] for p in ("weight", "scales", "biases") if f"{fused}.{p}" in packed]
    decoded = mx.dequantize(*parts, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    k = decoded.reshape(4, 128, 128)[:, :64].swapaxes(1, 2)
    assert same(floats[f"{name}.weight"], mx.contiguous(k).astype(floats[f"{name}.weight"].dtype))
    for made, wanted in ((source, spec), (eight, fine)):
        again = mx.quantize(
            mx.contiguous(k), group_size=wanted.group_size, bits=wanted.bits, mode=wanted.mode
        )
        for part, array in zip(("weight", "scales", "biases"), again, strict=False):
            assert same(made[f"{name}.{part}"], array)
    assert dense.shape == floats[f"{name}.weight"].shape
    load_strictly(eight, config, spec, embed_q=fine)
    load_strictly(floats, config, spec)


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_affine_weights_without_biases_get_zeros_where_that_is_asked_for(family: str, sample: Sample) -> None:
    weights, config = sample(family)
    packed = quantized(weights, QuantSpec())
    symmetric = {name: array for name, array in packed.items() if not name.endswith(".biases")}
    with pytest.raises(CheckpointError, match="its biases are missing"):
        mla_tools.sanitize(symmetric, config)
    made = mla_tools.sanitize(symmetric, config, missing_biases="zero")
    biases = [name for name in made if name.endswith("unembed_out.biases")]
    assert biases
    assert not any(mx.any(made[name]).item() for name in biases)
    load_strictly(made, config, QuantSpec())


def test_mixed_widths_keep_their_own(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    packed = quantized(weights, QuantSpec())
    name = "model.layers.0.mlp.down_proj"
    parts = mx.quantize(weights[f"{name}.weight"], group_size=32, bits=6)
    packed |= {
        f"{name}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=True)
    }
    made = mla_tools.sanitize(packed, config)
    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
        assert same(made[f"{name}.{part}"], array)
    section = {"group_size": 32, "bits": 6, "mode": "affine"}
    found = mla_tools.quantization_of(made, config)
    assert found == {**QuantSpec().config, name: section}
    # The source's config.json says which of them is the default.
    found = mla_tools.quantization_of(made, {**config, "quantization": section})
    assert found is not None
    assert {key: found[key] for key in section} == section
    assert name not in found


# --- experts decoded together ------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("elements", [1, 50_000, 1 << 40])
def test_experts_that_are_decoded_together_have_the_same_bits(
    elements: int, fmt: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, config = sample("deepseek_v3", fmt)
    with monkeypatch.context() as patched:
        patched.setattr(transform, "_joined", lambda step, weights: None)
        wanted = [mla_tools.sanitize(weights, config, embed_q="float", packed=how) for how in (True, False)]
    monkeypatch.setattr(transform, "_TOGETHER", elements)
    for how, made in zip((True, False), wanted, strict=True):
        assert_same(mla_tools.sanitize(weights, config, embed_q="float", packed=how), made)


def test_experts_of_which_one_is_stored_in_another_way(sample: Sample) -> None:
    weights, config = sample("deepseek_v3", "fp8")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    dense = sample("deepseek_v3", "bf16")[0][name]
    made = mla_tools.sanitize(weights, config)
    del weights[f"{name}_scale_inv"]
    mixed = mla_tools.sanitize({**weights, name: dense}, config)
    for key, array in made.items():
        if key == "model.layers.2.mlp.switch_mlp.up_proj.weight":
            assert same(mx.contiguous(mixed[key][3]), dense)
            assert same(mx.contiguous(mixed[key][2]), mx.contiguous(array[2]))
        else:
            assert same(mixed[key], array)


def test_a_stack_is_decoded_once(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config = sample("deepseek_v3", "fp8")
    rows = []

    def decode(codes: mx.array) -> mx.array:
        rows.append(codes.shape[0])
        return decode_e4m3(codes)

    monkeypatch.setattr("mla_tools.codecs.fp8_block.decode_e4m3", decode)
    mla_tools.sanitize(weights, config)
    codes = [name for name, array in weights.items() if array.dtype == mx.uint8]
    experts = [name for name in codes if ".experts." in name]
    stacks = len(experts) // config["n_routed_experts"]
    assert len(rows) == len(codes) - len(experts) + stacks < len(codes)
    assert sum(rows) == sum(weights[name].shape[0] for name in codes)


def test_the_expert_whose_scale_is_at_fault_is_named(sample: Sample) -> None:
    weights, config = sample("deepseek_v3", "fp8-ue8m0")
    name = "model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"
    weights[name] = mx.full(weights[name].shape, 255, mx.uint8)
    with pytest.raises(MlaToolsError, match=r"^model\.layers\.2\.mlp\.experts\.5\.up_proj: .* powers of two"):
        mla_tools.sanitize(weights, config)


# --- manners -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_the_dict_and_the_config_that_were_given_are_not_changed(fmt: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3", fmt)
    before, keys = dict(weights), json.dumps(config)
    made = mla_tools.sanitize(weights, config)
    assert list(weights) == list(before)
    assert all(weights[name] is before[name] for name in before)
    assert json.dumps(config) == keys
    assert made is not weights


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_nothing_is_evaluated(fmt: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3", fmt)
    nbytes = sum(array.nbytes for array in weights.values())
    before = mx.get_active_memory()
    made = mla_tools.sanitize(weights, config)
    lazy = mx.get_active_memory() - before
    mx.eval(made)
    assert lazy < nbytes / 100
    assert mx.get_active_memory() - before > nbytes / 2


def test_order_does_not_matter(sample: Sample) -> None:
    weights, config = sample("kimi_linear")
    backwards = dict(reversed(weights.items()))
    made, again = mla_tools.sanitize(weights, config), mla_tools.sanitize(backwards, config)
    assert list(made) == list(again)
    assert_same(made, again)


# --- a part of a checkpoint --------------------------------------------------------------------------


def without_layers(weights: Mapping[str, mx.array], number: int) -> Weights:
    lie_there = re.compile(rf"(?:^|\.)layers\.{number}\.")
    return {name: array for name, array in weights.items() if not lie_there.search(name)}


@each_family
def test_nothing_gives_nothing(family: str, sample: Sample) -> None:
    _, config = sample(family)
    assert mla_tools.sanitize({}, config) == {}
    assert mla_tools.quantization_of({}, config) is None
    with pytest.raises(CheckpointError):
        mla_tools.sanitize({}, config, strict=True)


@each_family
@pytest.mark.parametrize("layer", [0, 1])
def test_some_layers_give_what_all_give_of_them(family: str, layer: int, sample: Sample) -> None:
    weights, config = sample(family, "f32")
    wanted = without_layers(mla_tools.sanitize(weights, config, strict=True), layer)
    part = without_layers(weights, layer)
    assert 0 < len(part) < len(weights)
    assert_same(mla_tools.sanitize(part, config), wanted)


def test_a_half_gathered_set_is_named(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    for part in ("up", "gate"):
        del weights[f"model.layers.2.mlp.experts.5.{part}_proj.weight"]
    del weights["model.norm.weight"]
    assert problems(weights, config, strict=False) == {
        "model.layers.2.mlp.switch_mlp.up_proj": "expert 5 is missing",
        "model.layers.2.mlp.switch_mlp.gate_proj": "expert 5 is missing",
    }


@pytest.mark.parametrize("dtype", [mx.float32, mx.uint32, mx.uint8, mx.bool_], ids=str)
def test_what_no_rule_names_stays_as_it_is(dtype: mx.Dtype, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    others = {
        "my_projector.weight": mx.zeros((4, 4)).astype(dtype),
        "my_projector.scales": mx.zeros((4, 1)),
        "model.layers.0.self_attn.q_a_proj.lora_a": mx.zeros((4, 4)),
    }
    made = mla_tools.sanitize({**weights, **others}, config)
    assert_same(made, {**mla_tools.sanitize(weights, config), **others})
    assert all(made[name] is array for name, array in others.items())
    assert len(problems({**weights, **others}, config)) == len(others)


def test_mtp_layers_that_are_not_proved_to_be_some_stay_as_they_are(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    layer = {
        n: a for n, a in loaded(support.sample("deepseek_v3")).items() if n.startswith("model.layers.4.")
    }
    (marker,) = (name for name in layer if name.endswith("eh_proj.weight"))
    del layer[marker]
    made = mla_tools.sanitize({**weights, **layer}, config)
    assert_same(made, {**mla_tools.sanitize(weights, config), **layer})
    specs = {name: spec for name, array in layer.items() if (spec := spec_of(array)) is not None}
    steps = make_steps(specs, config, Options(), partial=True)
    assert not steps.drops
    assert sorted(steps.foreign) == sorted(layer)


@pytest.mark.parametrize("fmt", ["fp8", "ct-int4", "awq", "quark-mxfp4"])
def test_a_part_of_a_weight_in_some_format_is_a_problem(fmt: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3", fmt)
    name = "model.layers.0.mlp.down_proj"
    parts = [part for part in weights if part.startswith(f"{name}.")]
    assert len(parts) >= 2
    for part in parts:
        # The shape that compressed-tensors stores beside the codes says nothing that they do not say.
        if not part.endswith("weight_shape"):
            found = problems({n: a for n, a in weights.items() if n != part}, config, strict=False)
            assert any(subject.startswith(name) for subject in found), part


# --- in mlx_lm.load ----------------------------------------------------------------------------------

# load_model refuses these by their config.json, or dies where sanitize has left nothing to be unpacked.
REFUSED = {"ct-fp8-channel", "ct-fp8-block", "gptq"}
LOADED = [fmt for fmt in FORMATS if fmt not in REFUSED]
# AWQ in the classes for which mlx-lm has no sanitize that stacks or splits something.
UNPACKED = ["minicpm3", "youtu_llm"]


def load(family: str, fmt: str, sanitize: Callable[[Weights, Config], Weights] | None) -> Any:
    """Return the model that mlx_lm's load_model makes of a sample with this sanitize, or the class's own.

    `sanitize` gets the config that load_model goes on with.
    """

    def with_it(config: Config) -> tuple[Any, Any]:
        config.update({**(MODEL_TYPES[family].defaults or {}), **config})
        config.setdefault("model_type", MODEL_TYPES[family].model_type)
        model_class, args_class = classes(config)
        if sanitize is not None:
            members = {"sanitize": lambda _, weights: sanitize(weights, config)}
            model_class = type("Model", (model_class,), members)
        return model_class, args_class

    return load_model(support.sample(family, fmt), lazy=True, get_model_classes=with_it)[0]


def parameters(model: Any) -> Weights:
    return dict(nn.utils.tree_flatten(model.parameters()))


@pytest.mark.parametrize(("family", "fmt"), product(MODEL_TYPES, LOADED, pairs(MODEL_TYPES, LOADED)))
def test_mlx_lm_loads_what_is_decoded(family: str, fmt: str) -> None:
    made: Weights = {}

    def sanitize(weights: Weights, config: Config) -> Weights:
        made.update(mla_tools.sanitize(weights, config, packed=False))
        return made

    model = load(family, fmt, sanitize)
    if fmt != "awq":
        assert_same(parameters(model), made)
        assert not any(array.dtype == mx.uint32 for array in made.values())


@pytest.mark.parametrize(("family", "fmt"), product(MODEL_TYPES, FORMATS, pairs(MODEL_TYPES, FORMATS)))
def test_mlx_lm_loads_what_is_packed_with_its_quantization(family: str, fmt: str) -> None:
    made: Weights = {}

    def sanitize(weights: Weights, config: Config) -> Weights:
        # The K half of int8 in groups of 128 has no encoding like its source's.
        made.update(mla_tools.sanitize(weights, config, embed_q="float"))
        config.pop("quantization_config", None)
        config["quantization"] = mla_tools.quantization_of(made, config)
        return made

    model = load(family, fmt, sanitize)
    assert_same(parameters(model), made)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt not in ("bf16", "f32")])
def test_the_quantization_is_that_of_a_conversion(fmt: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3", fmt)
    found = mla_tools.quantization_of(mla_tools.sanitize(weights, config, embed_q="float"), config)
    planned = plan(support.sample("deepseek_v3", fmt), Options(embed_q="float")).model
    assert found == planned.config.get("quantization")


@each_family
def test_a_decoded_weight_has_the_numbers_of_the_packed_one(family: str, sample: Sample) -> None:
    weights, config = sample(family, "fp8-ue8m0")
    packed = mla_tools.sanitize(weights, config)
    decoded = mla_tools.sanitize(weights, config, packed=False)
    found = 0
    for name in decoded:
        path = name.removesuffix(".weight")
        if path != name and f"{path}.scales" in packed and ".embed_q" not in name:
            parts = packed[name], packed[f"{path}.scales"]
            number = mx.dequantize(*parts, group_size=32, bits=8, mode="mxfp8").astype(mx.bfloat16)
            assert same(decoded[name], number), name
            found += 1
    assert found >= 4


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_what_mlx_has_quantized_stays_packed(mode: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    packed = quantized(weights, SPECS[mode])
    assert_same(mla_tools.sanitize(packed, config, packed=False), mla_tools.sanitize(packed, config))


@pytest.mark.parametrize("family", UNPACKED)
def test_awq_is_unpacked_by_mlx_lm(family: str) -> None:
    ours = load(family, "awq", lambda weights, config: mla_tools.sanitize(weights, config, packed=False))
    assert_same(parameters(ours), parameters(load(family, "awq", None)))
    assert any(array.dtype == mx.uint32 for array in parameters(ours).values())


# --- errors ------------------------------------------------------------------------------------------


def problems(weights: Weights, config: Config, *, strict: bool = True) -> dict[str, str]:
    with pytest.raises(CheckpointError) as caught:
        mla_tools.sanitize(weights, config, strict=strict)
    return {problem.subject: problem.what for problem in caught.value.problems}


def test_all_problems_are_listed_at_once(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    layer = "model.layers.2"
    del weights[f"{layer}.mlp.experts.5.up_proj.weight"]
    del weights["model.norm.weight"]
    weights["model.visual.weight"] = mx.zeros((2, 2))
    weights["lm_head.weight"] = mx.zeros((511, 256))
    found = problems(weights, config)
    assert found == {
        f"{layer}.mlp.switch_mlp.up_proj": "expert 5 is missing",
        "model.norm": "missing",
        "model.visual": "unknown tensor",
        "lm_head": "shape mismatch",
    }


def test_a_tensor_in_both_layouts_is_a_problem(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    made = mla_tools.sanitize(weights, config)
    name = "model.layers.1.self_attn.unembed_out.weight"
    found = problems({**weights, name: made[name]}, config)
    assert found["model.layers.1.self_attn.unembed_out.weight".removesuffix(".weight")] == "duplicate"


@pytest.mark.parametrize("spelt", ["01", "001", "\u0661"])
def test_a_layer_number_spelt_in_two_ways_is_not_taken_silently(spelt: str, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    weights[f"model.layers.{spelt}.input_layernorm.weight"] = mx.zeros((256,))
    assert f"model.layers.{spelt}.input_layernorm" in problems(weights, config)


def test_a_number_of_ten_thousand_digits_is_an_unknown_tensor(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    name = f"model.layers.{'1' * 10_000}.input_layernorm"
    weights[f"{name}.weight"] = mx.zeros((256,))
    assert problems(weights, config) == {name: "unknown tensor"}


@pytest.mark.parametrize(
    "dtype", [mx.bool_, mx.complex64, mx.int8, mx.uint16, mx.uint64], ids=lambda dtype: str(dtype)
)
def test_a_tensor_of_a_dtype_that_no_model_has_is_a_problem(dtype: mx.Dtype, sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    weights["model.mask"] = mx.zeros((2, 2)).astype(dtype)
    assert list(problems(weights, config)) == ["model.mask"]


def test_scales_that_do_not_fit_are_a_problem(sample: Sample) -> None:
    weights, config = sample("deepseek_v3", "fp8")
    name = "model.layers.0.mlp.down_proj"
    weights[f"{name}.weight_scale_inv"] = mx.zeros((3, 4))
    assert name in problems(weights, config)


def test_a_config_of_no_family_is_a_problem() -> None:
    assert problems({}, {"model_type": "llama"}) == {"config.json": "this architecture is not known"}


def test_a_config_without_its_numbers_lists_them(sample: Sample) -> None:
    weights, config = sample("deepseek_v3")
    for key in ("kv_lora_rank", "v_head_dim"):
        del config[key]
    with pytest.raises(CheckpointError) as caught:
        mla_tools.sanitize(weights, config)
    assert len(caught.value.problems) == 2
    assert "kv_lora_rank" in str(caught.value)
    assert "v_head_dim" in str(caught.value)
