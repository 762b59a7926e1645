"""The oracle against mlx-lm and transformers alone; nothing of mla_tools takes part.

While the oracle is what oracle.lock says, a few families stand for all.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import reference
import reference_v4
import torch
from reference import (
    FAMILIES,
    FP8_FAMILIES,
    KEPT,
    STORAGES,
    checkpoint,
    make_checkpoint,
    mlx_logits,
    model_type,
    reference_truth,
    relative_error,
    truth,
)
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5

# One with two storages and an expert group, one with most names of its own and linear attention.
FEW = ("deepseek_v3", "bailing_hybrid")


def own(family: str, *rest: str) -> Any:
    """Return a case of a test of the oracle itself."""
    return pytest.param(
        family, *rest, id="-".join((family, *rest)), marks=[] if family in FEW else [pytest.mark.oracle]
    )


each_family = pytest.mark.parametrize("family", [own(family) for family in FAMILIES])
each_checkpoint = pytest.mark.parametrize(("family", "storage"), [own(*pair) for pair in STORAGES])
each_fp8_family = pytest.mark.parametrize("family", FP8_FAMILIES)


def headers(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """File name -> tensor name -> (dtype, shape), from the bytes of the files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__")
        found[file.name] = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    assert found, f"{folder} holds no files"
    return found


def merged(folder: Path) -> dict[str, tuple[str, list[int]]]:
    parts = headers(folder).values()
    whole = {name: entry for part in parts for name, entry in part.items()}
    assert len(whole) == sum(map(len, parts))  # no tensor is stored twice
    return whole


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert found, f"{folder} holds no weights"
    return found


def test_the_lock_is_that_of_this_oracle() -> None:
    here, lock = oracle.found(), oracle.locked()
    wanted = {part: lock[part] for part in ("files", "pinned")}
    assert {part: here[part] for part in wanted} == wanted, "the oracle changed: run `make oracle`"


# --------------------------------------------------------------------------------------------------
# Logits


# MiniCPM3 is not here: where its config is silent mlx-lm takes another rope_theta and a head of its own.
BY_ITSELF = [pair for pair in STORAGES if pair[0] != "minicpm3"]


@pytest.mark.parametrize(("family", "storage"), [own(*pair) for pair in BY_ITSELF])
def test_mlx_lm_agrees_on_the_hub_folder(family: str, storage: str) -> None:
    # mlx-lm's deepseek_v3 drops no other MTP layer than the one with the number 61.
    folder = checkpoint(family, storage, mtp=family != "deepseek_v3")
    overrides = {"model_type": "longcat_flash"} if family == "longcat_flash" else {}
    # mlx-lm decodes FP8 to bfloat16; the scales of V3.2 are powers of two, so that nothing is rounded.
    cast = "bfloat16" if storage == "fp8" and family != "deepseek_v32" else None
    prefill, decode = relative_error(
        mlx_logits(folder, overrides=overrides), reference_truth(family, storage, cast)
    )
    assert prefill <= TOLERANCE
    assert decode <= TOLERANCE


@each_family
def test_from_pretrained_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    """transformers' own renaming and stacking of hub tensors means the same as ours."""
    hub = stored_tensors(checkpoint(family, "f32", mtp=False))
    hub = {name: tensor for name, tensor in hub.items() if not name.startswith("model.mtp.")}
    config = {**FAMILIES[family], "torch_dtype": "float32"}
    package, _ = reference._CLASSES[model_type(config)]
    config["model_type"] = package  # kimi_k2 is no model_type of transformers
    if family == "longcat_flash":
        config["head_dim"] = config["qk_rope_head_dim"]
        # transformers wants gate and up rows for the zero experts too, which the hub does not store.
        for name, tensor in list(hub.items()):
            if match := re.fullmatch(r"(.*\.mlp\.experts\.)([0-3])(\.(?:gate|up)_proj\.weight)", name):
                hub[f"{match[1]}{8 + int(match[2])}{match[3]}"] = torch.zeros_like(tensor)
    save_file(hub, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    model, info = getattr(module, reference.class_name(FAMILIES[family])).from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.endswith("rotary_emb.inv_freq") for name in info["unexpected_keys"])
    errors = relative_error(reference.torch_logits(model.eval()), reference_truth(family, "f32"))
    assert max(errors) <= TOLERANCE


@each_checkpoint
def test_rounding_the_weights_flips_no_choice(family: str, storage: str) -> None:
    errors = relative_error(reference_truth(family, storage, "bfloat16"), reference_truth(family, storage))
    assert max(errors) < 0.025


@each_family
def test_cast_keeps_what_mlx_lm_keeps(family: str) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    kind = model_type(FAMILIES[family])
    config = {**FAMILIES[family], "model_type": kind}
    model_class, args = _get_classes(config)
    model = model_class(args.from_dict(config))
    predicate = getattr(model, "cast_predicate", lambda _: True)
    for name, _ in tree_flatten(model.parameters()):
        assert predicate(name) == (name.rpartition(".")[2] not in KEPT.get(kind, ())), name


WEIGHTS = [
    *((family, r"\.kv_b_proj\.weight$") for family in FAMILIES),
    ("deepseek_v3", r"e_score_correction_bias$"),
    ("deepseek_v32", r"e_score_correction_bias$"),
    ("deepseek_v32", r"indexer\.wk\.weight$"),
    ("glm_moe_dsa", r"e_score_correction_bias$"),
    ("glm_moe_dsa", r"indexer\.wk\.weight$"),
    ("mistral4", r"experts\.gate_up_proj$"),
    ("mistral3", r"experts\.down_proj$"),
    ("kimi_k2", r"e_score_correction_bias$"),
    ("glm4_moe_lite", r"e_score_correction_bias$"),
    ("kimi_linear", r"e_score_correction_bias$"),
    ("kimi_linear", r"\.A_log$"),
    ("kimi_linear", r"\.k_conv1d\.weight$"),
    ("longcat_flash", r"e_score_correction_bias$"),
    ("bailing_hybrid", r"expert_bias$"),
    ("bailing_hybrid", r"\.A_log$"),
    ("bailing_hybrid", r"\.g_proj\.weight$"),
]


@pytest.mark.parametrize(("family", "pattern"), [own(*pair) for pair in WEIGHTS])
def test_the_logits_depend_on(family: str, pattern: str) -> None:
    """Shifting a tensor along its longest axis moves the logits: none of these may be dead weight."""
    folder = checkpoint(family, "f32")
    config = json.loads((folder / "config.json").read_text())
    hub = stored_tensors(folder)
    touched = [name for name in hub if re.search(pattern, name)]
    assert touched
    for name in touched:
        hub[name] = hub[name].roll(1, dims=max(range(hub[name].ndim), key=lambda d, s=hub[name].shape: s[d]))
    changed = reference.hub_logits(hub, config, None)
    assert max(relative_error(changed, reference_truth(family, "f32"))) > 1e-3


@pytest.mark.parametrize("config", [pytest.param("plain", marks=pytest.mark.oracle), "yarn"])
def test_deepseek_v4_decodes_what_it_prefills(config: str) -> None:
    source, ids = reference_v4.reference(config), reference_v4.tokens(300)
    assert reference_v4.relative(source.cached(ids, [130, *[1] * 20, 150]), source.logits(ids)) < TOLERANCE


@each_family
def test_the_last_tokens_are_decoded_from_a_cache(family: str) -> None:
    """Prefill and decode are of different tokens, finite, and not flat."""
    logits = reference_truth(family, "f32")
    assert logits.prefill.shape == (24, 320)
    assert logits.decode.shape == (6, 320)
    for rows in (logits.prefill, logits.decode):
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert rows.std(axis=0).min() > 0.05


# --------------------------------------------------------------------------------------------------
# What is in the files

# Expected tensors: pattern -> (dtype, shape), dtypes as in the BF16 checkpoint. F8 stands for F8_E4M3 with
# scales in the FP8 checkpoint, BF16 in the other. {0-3} counts, {a,b} enumerates.
Pattern = dict[str, tuple[str, list[int]]]


def mla(layers: str, *, q_lora: int | None = 128, v: int = 64, norm: str = "BF16") -> Pattern:
    attn = f"model.layers.{layers}.self_attn."
    q: Pattern = {attn + "q_proj.weight": ("F8", [384, 192])}
    if q_lora is not None:
        q = {
            attn + "q_a_proj.weight": ("F8", [q_lora, 192]),
            attn + "q_a_layernorm.weight": (norm, [q_lora]),
            attn + "q_b_proj.weight": ("F8", [384, q_lora]),
        }
    return {
        **q,
        attn + "kv_a_proj_with_mqa.weight": ("F8", [160, 192]),
        attn + "kv_a_layernorm.weight": (norm, [128]),
        attn + "kv_b_proj.weight": ("F8", [4 * (64 + v), 128]),
        attn + "o_proj.weight": ("F8", [192, 4 * v]),
    }


def glu(block: str, inner: int, names: str = "gate_proj up_proj down_proj") -> Pattern:
    gate, up, down = names.split()
    return {
        f"{block}.{gate}.weight": ("F8", [inner, 192]),
        f"{block}.{up}.weight": ("F8", [inner, 192]),
        f"{block}.{down}.weight": ("F8", [192, inner]),
    }


def ends(norm: str = "BF16") -> Pattern:
    return {
        "model.embed_tokens.weight": ("BF16", [320, 192]),
        "model.norm.weight": (norm, [192]),
        "lm_head.weight": ("BF16", [320, 192]),
    }


def norms(layers: str, norm: str = "BF16") -> Pattern:
    return {f"model.layers.{layers}.{n}_layernorm.weight": (norm, [192]) for n in ("input", "post_attention")}


def moe(layers: str, shared: int = 1, bias: bool = True) -> Pattern:
    block = f"model.layers.{layers}.mlp"
    return {
        **glu(f"{block}.experts.{{0-7}}", 64),
        **glu(f"{block}.shared_experts", 64 * shared),
        f"{block}.gate.weight": ("BF16", [8, 192]),
        **({f"{block}.gate.e_score_correction_bias": ("F32", [8])} if bias else {}),
    }


def mtp(layer: int, norm: str = "BF16", copies: bool = True) -> Pattern:
    names = ("embed_tokens", "shared_head.head") if copies else ()
    return {
        **{f"model.layers.{layer}.{name}.weight": ("BF16", [320, 192]) for name in names},
        f"model.layers.{layer}.eh_proj.weight": ("BF16", [192, 384]),
        f"model.layers.{layer}.{{enorm,hnorm}}.weight": (norm, [192]),
        f"model.layers.{layer}.shared_head.norm.weight": (norm, [192]),
    }


V3 = {**ends(), **mla("{0-2}"), **norms("{0-2}"), **glu("model.layers.0.mlp", 320), **moe("{1-2}")}
KDA = "model.layers.{0,2}.self_attn."
LING_KDA = "model.layers.{0,2}.attention."
KIMI_MOE = "model.layers.{1-3}.block_sparse_moe."
LONGCAT_MLA = {
    key.replace("self_attn.", "self_attn.{0,1}."): entry for key, entry in mla("{0-1}", q_lora=64).items()
}
MISTRAL: Pattern = {
    **ends(),
    **mla("{0-2}"),
    **norms("{0-2}"),
    **glu("model.layers.0.mlp", 320),
    **glu("model.layers.{1-2}.mlp.shared_experts", 64),
    "model.layers.{1-2}.mlp.gate.weight": ("BF16", [8, 192]),
    "model.layers.{1-2}.mlp.experts.gate_up_proj": ("BF16", [8, 128, 192]),
    "model.layers.{1-2}.mlp.experts.down_proj": ("BF16", [8, 192, 64]),
}
PIXTRAL = "vision_tower.transformer.layers.0."
LONGCAT_MTP = "model.mtp.layers.0."

EXPECTED: dict[str, Pattern] = {
    "deepseek_v3": {**V3, **mla("3"), **norms("3"), **moe("3"), **mtp(3)},
    "kimi_k2": {**V3, "model.layers.{0-2}.self_attn.rotary_emb.inv_freq": ("F32", [16])},
    "deepseek_v32": {
        **ends("F32"),
        **mla("{0-3}", norm="F32"),
        **norms("{0-3}", "F32"),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-3}"),
        **mtp(3, "F32"),
        "model.layers.{0-3}.self_attn.indexer.wq_b.weight": ("F8", [16 * 64, 128]),
        "model.layers.{0-3}.self_attn.indexer.wk.weight": ("F8", [64, 192]),
        "model.layers.{0-3}.self_attn.indexer.k_norm.{weight,bias}": ("F32", [64]),
        "model.layers.{0-3}.self_attn.indexer.weights_proj.weight": ("BF16", [16, 192]),
    },
    "glm4_moe_lite": {
        **ends(),
        **mla("{0-3}", q_lora=64, v=128),
        **norms("{0-3}"),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-3}"),
        **mtp(3),
    },
    "kimi_linear": {
        **ends(),
        **mla("{1,3}", q_lora=None),
        **norms("{0-3}"),
        KDA + "A_log": ("F32", [1, 1, 4, 1]),
        KDA + "dt_bias": ("F32", [256]),
        KDA + "b_proj.weight": ("BF16", [4, 192]),
        KDA + "{f_a_proj,g_a_proj}.weight": ("BF16", [64, 192]),
        KDA + "{f_b_proj,g_b_proj}.weight": ("BF16", [256, 64]),
        KDA + "{q_proj,k_proj,v_proj}.weight": ("BF16", [256, 192]),
        KDA + "{q_conv1d,k_conv1d,v_conv1d}.weight": ("BF16", [256, 1, 4]),
        KDA + "o_norm.weight": ("BF16", [64]),
        KDA + "o_proj.weight": ("BF16", [192, 256]),
        **glu("model.layers.0.mlp", 320),
        KIMI_MOE + "gate.weight": ("BF16", [8, 192]),
        KIMI_MOE + "gate.e_score_correction_bias": ("BF16", [8]),
        **glu(KIMI_MOE + "shared_experts", 64),
        **glu(KIMI_MOE + "experts.{0-7}", 64, "w1 w3 w2"),
    },
    "bailing_hybrid": {
        **{k.replace("embed_tokens", "word_embeddings"): entry for k, entry in ends().items()},
        **{
            k.replace("self_attn", "attention").replace("o_proj", "dense"): entry
            for k, entry in mla("{1,3,4}", q_lora=None).items()
        },
        "model.layers.{1,3,4}.attention.g_proj.weight": ("BF16", [4, 192]),
        **norms("{0-4}"),
        LING_KDA + "A_log": ("F32", [4]),
        LING_KDA + "dt_bias": ("F32", [256]),
        LING_KDA + "b_proj.weight": ("BF16", [4, 192]),
        LING_KDA + "{q_proj,k_proj,v_proj,f_proj,g_proj}.weight": ("BF16", [256, 192]),
        LING_KDA + "{q_conv1d,k_conv1d,v_conv1d}.weight": ("BF16", [256, 1, 4]),
        LING_KDA + "o_norm.weight": ("BF16", [64]),
        LING_KDA + "o_proj.weight": ("BF16", [192, 256]),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-4}", bias=False),
        "model.layers.{1-4}.mlp.gate.expert_bias": ("F32", [8]),
        "model.layers.4.eh_proj.weight": ("BF16", [192, 384]),
        "model.layers.4.{enorm,hnorm,final_layernorm}.weight": ("BF16", [192]),
    },
    "longcat_flash": {
        **ends(),
        **LONGCAT_MLA,
        "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.{0,1}.weight": ("BF16", [192]),
        **glu("model.layers.{0-1}.mlps.{0,1}", 320),
        **glu("model.layers.{0-1}.mlp.experts.{0-7}", 64),
        "model.layers.{0-1}.mlp.router.classifier.weight": ("F32", [12, 192]),
        "model.layers.{0-1}.mlp.router.e_score_correction_bias": ("F32", [12]),
        "model.mtp.embed_tokens.weight": ("BF16", [320, 192]),
        "model.mtp.norm.weight": ("BF16", [192]),
        LONGCAT_MTP + "eh_proj.weight": ("BF16", [192, 384]),
        LONGCAT_MTP + "{enorm,hnorm}.m.weight": ("BF16", [192]),
        LONGCAT_MTP + "{input_layernorm,post_attention_layernorm}.weight": ("BF16", [192]),
        **{k.replace("model.layers.0.", LONGCAT_MTP): e for k, e in mla("0", q_lora=64).items()},
        **glu(LONGCAT_MTP + "transformer_layer.mlp", 320),
    },
    "glm_moe_dsa": {
        **ends(),
        **mla("{0-3}", q_lora=64, v=128),
        **norms("{0-3}"),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-3}"),
        **mtp(3, copies=False),
        "model.layers.{0-3}.self_attn.indexer.wq_b.weight": ("F8", [16 * 64, 64]),
        "model.layers.{0-3}.self_attn.indexer.wk.weight": ("F8", [64, 192]),
        "model.layers.{0-3}.self_attn.indexer.k_norm.{weight,bias}": ("BF16", [64]),
        "model.layers.{0-3}.self_attn.indexer.weights_proj.weight": ("BF16", [16, 192]),
    },
    "youtu_llm": {
        **{name: entry for name, entry in ends().items() if name != "lm_head.weight"},
        **mla("{0-2}"),
        **norms("{0-2}"),
        **glu("model.layers.{0-2}.mlp", 320),
    },
    "minicpm3": {
        **{name: entry for name, entry in ends().items() if name != "lm_head.weight"},
        **mla("{0-2}", v=48),
        **norms("{0-2}"),
        **glu("model.layers.{0-2}.mlp", 320),
    },
    "mistral4": MISTRAL,
    "mistral3": {
        **{f"language_model.{name}": entry for name, entry in MISTRAL.items()},
        "multi_modal_projector.norm.weight": ("BF16", [32]),
        "multi_modal_projector.patch_merger.merging_layer.weight": ("BF16", [32, 128]),
        "multi_modal_projector.linear_1.weight": ("BF16", [192, 32]),
        "multi_modal_projector.linear_2.weight": ("BF16", [192, 192]),
        "vision_tower.patch_conv.weight": ("BF16", [32, 3, 14, 14]),
        "vision_tower.ln_pre.weight": ("BF16", [32]),
        PIXTRAL + "{attention_norm,ffn_norm}.weight": ("BF16", [32]),
        PIXTRAL + "attention.{q_proj,k_proj,v_proj,o_proj}.weight": ("BF16", [32, 32]),
        PIXTRAL + "feed_forward.{gate_proj,up_proj}.weight": ("BF16", [64, 32]),
        PIXTRAL + "feed_forward.down_proj.weight": ("BF16", [32, 64]),
    },
    "deepseek_v2_lite": {
        **ends(),
        **mla("{0-2}", q_lora=None),
        **norms("{0-2}"),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-2}", shared=2, bias=False),
    },
    "deepseek_v2": {
        **ends(),
        **mla("{0-2}", q_lora=64),
        **norms("{0-2}"),
        **glu("model.layers.0.mlp", 320),
        **moe("{1-2}", shared=2, bias=False),
    },
}


def expanded(patterns: Pattern, storage: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every stored tensor."""
    stored = {}
    for pattern, (dtype, shape) in patterns.items():
        pieces = re.split(r"\{([^}]*)\}", pattern)
        choices = []
        for inner in pieces[1::2]:
            low, dash, high = inner.partition("-")
            choices.append([str(n) for n in range(int(low), int(high) + 1)] if dash else inner.split(","))
        for choice in itertools.product(*choices):
            name = "".join(itertools.chain.from_iterable(zip(pieces[0::2], [*choice, ""], strict=True)))
            assert name not in stored
            if storage == "f32":
                stored[name] = ("F32", shape)
            elif dtype != "F8":
                stored[name] = (dtype, shape)
            elif storage == "bf16":
                stored[name] = ("BF16", shape)
            else:
                stored[name] = ("F8_E4M3", shape)
                stored[f"{name}_scale_inv"] = ("F32", [math.ceil(n / 128) for n in shape])
    return stored


@each_checkpoint
def test_names_dtypes_and_shapes_are_the_hubs(family: str, storage: str) -> None:
    assert merged(checkpoint(family, storage)) == expanded(EXPECTED[family], storage)


@each_family
def test_index_tells_where_each_tensor_is(family: str) -> None:
    folder = checkpoint(family, "bf16")
    files = headers(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert list(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["weight_map"] == {name: file for file, part in files.items() for name in part}
    elements = sum(math.prod(shape) for part in files.values() for _, shape in part.values())
    if model_type(FAMILIES[family]) in ("deepseek_v3", "kimi_k2"):
        assert index["metadata"]["total_size"] == 2 * elements
    if family == "glm4_moe_lite":
        assert index["metadata"]["total_size"] == elements


@each_fp8_family
def test_fp8_scales_lie_in_other_shards_and_blocks_are_cut(family: str) -> None:
    folder = checkpoint(family, "fp8")
    places = {name: file for file, part in headers(folder).items() for name in part}
    names = [name for name in places if name.endswith("_scale_inv")]
    apart = [name for name in names if places[name] != places[name.removesuffix("_scale_inv")]]
    assert any("o_proj" in name for name in apart)
    assert len(apart) < len(names)
    whole = merged(folder)
    assert whole["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", [2, 2])


@each_fp8_family
def test_fp8_numbers_are_close_to_those_that_were_encoded(family: str) -> None:
    exact, coarse = (stored_tensors(checkpoint(family, storage)) for storage in ("f32", "fp8"))
    decoded = reference.decoded(coarse)
    assert decoded.keys() == exact.keys()
    for name, weight in exact.items():
        if f"{name}_scale_inv" in coarse:
            scale = coarse[f"{name}_scale_inv"]
            # half a step of a normal number, or of the smallest subnormal one
            bound = torch.maximum(weight.abs() * 2.0**-4, scale.max() * 2.0**-10) * 1.001
            assert ((decoded[name] - weight).abs() <= bound).all(), name
            assert coarse[name].float().abs().max() > 200, name  # the range is used
            if family == "deepseek_v32":
                assert (torch.frexp(scale).mantissa == 0.5).all(), name


def test_config_is_the_hubs() -> None:
    read = {f: json.loads((checkpoint(f, "bf16") / "config.json").read_text()) for f in FAMILIES}
    assert "model_type" not in read["longcat_flash"]
    assert "num_hidden_layers" not in read["longcat_flash"]
    nested = {"glm_moe_dsa", "mistral4"}
    assert {family for family, config in read.items() if "rope_parameters" in config} == nested
    assert all("dtype" not in config for config in read.values())
    assert all("quantization_config" not in config for config in read.values())
    fp8 = {f: json.loads((checkpoint(f, "fp8") / "config.json").read_text()) for f in FP8_FAMILIES}
    plain = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    for family, config in fp8.items():
        extra = {"scale_fmt": "ue8m0"} if family == "deepseek_v32" else {}
        assert config.pop("quantization_config") == {**plain, "weight_block_size": [128, 128], **extra}
        assert config == read[family]


@each_family
def test_tokenizer_loads_offline(family: str) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer looks at config.json first, and transformers 5.23 cannot read one that has yarn and a
    # model_type it does not know: the real kimi_k2 fails in the same way unless its own code is run.
    loader = PreTrainedTokenizerFast if family == "kimi_k2" else AutoTokenizer
    tokenizer = loader.from_pretrained(checkpoint(family, "bf16"))
    text = "Ü a\n\tmla 9"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())  # a token is a byte
    assert tokenizer.decode(ids) == text
    numbers = reference._numbers(FAMILIES[family])
    assert tokenizer.eos_token_id == numbers["eos_token_id"]
    assert len(tokenizer) <= numbers["vocab_size"]


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path, "fp8")
    for file in checkpoint("deepseek_v3", "fp8").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_seed_and_shards(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v2_lite", tmp_path / "one", "bf16", shards=1)
    assert sorted(headers(tmp_path / "one")) == ["model.safetensors"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    same = relative_error(truth(tmp_path / "one"), reference_truth("deepseek_v2_lite", "bf16"))
    assert same == (0.0, 0.0)
    make_checkpoint("deepseek_v2_lite", tmp_path / "five", "bf16", seed=1, shards=5)
    assert len(headers(tmp_path / "five")) == 5
    other = relative_error(truth(tmp_path / "five"), reference_truth("deepseek_v2_lite", "bf16"))
    assert min(other) > 0.1
    with pytest.raises(ValueError, match="glm4_moe_lite has no FP8 checkpoint"):
        make_checkpoint("glm4_moe_lite", tmp_path / "none", "fp8")
