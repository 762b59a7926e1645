"""The table of DeepSeek V4: every layout makes what the class declares, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mla_tools.architectures import table_of
from mla_tools.codecs import Native
from mla_tools.models.deepseek_v4 import Model, ModelArgs
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.quantization import QuantSpec
from mla_tools.samples import sample_config
from mla_tools.spec import DType, Spec

SAMPLE = sample_config("deepseek_v4")
size = st.integers(1, 9)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Return a config of other sizes, no two of them alike by nature."""
    layers, groups, pairs = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ratios = draw(st.lists(st.sampled_from([0, 4, 128]), min_size=layers, max_size=layers + 3))
    sizes = {
        key: draw(size) for key in ("vocab_size", "hidden_size", "q_lora_rank", "o_lora_rank", "hc_mult")
    }
    sizes |= {key: draw(size) for key in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")}
    sizes |= {key: draw(size) for key in ("moe_intermediate_size", "index_n_heads", "num_hash_layers")}
    return {
        **SAMPLE,
        **sizes,
        "num_hidden_layers": layers,
        "compress_ratios": ratios,
        "o_groups": groups,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "head_dim": 2 * pairs + draw(size),
        "index_head_dim": 2 * pairs + draw(size),
        "qk_rope_head_dim": 2 * pairs,
    }


@settings(max_examples=40, deadline=None)
@given(configs())
def test_the_targets_are_the_parameters_of_the_class(config: dict[str, Any]) -> None:
    _, table = table_of(config)
    model = Model(ModelArgs.from_dict(config))
    declared = {name: array.shape for name, array in tree_flatten(model.parameters())}
    made = {name: tuple(map(int, shape)) for name, (shape, _) in table.targets().items()}
    assert made == declared


@settings(max_examples=40, deadline=None)
@given(configs())
def test_every_layout_makes_the_shape_of_its_target(config: dict[str, Any]) -> None:
    _, table = table_of(config)
    known = table.targets()
    for rule in table.routes:
        shapes = rule.target_shapes()
        for key in rule.applications():
            for target, shape in zip(rule.targets(key), shapes, strict=True):
                assert tuple(map(int, shape)) == tuple(map(int, known[target][0])), rule


def dense() -> dict[str, Spec]:
    """Return the sample's tensors under the names of the class."""
    targets = table_of(dict(SAMPLE))[1].targets()
    return {
        name: Spec(tuple(map(int, shape)), DType.I32 if param.integer else DType.BF16)
        for name, (shape, param) in targets.items()
    }


NAMES = {
    "language_model.model.layers.1.attn.compressor.ape": "model.layers.1.attn.compressor.ape",
    "model.layers.1.self_attn.compressor.indexer.position_bias": "model.layers.1.attn.indexer.compressor.ape",
    "layers.1.hc_ffn.scale": "model.layers.1.ffn_hc.scale",
    "model.layers.2.mlp.gate.e_score_correction_bias": "model.layers.2.ffn.gate.e_score_correction_bias",
    "layers.2.ffn.experts.w3.weight": "model.layers.2.ffn.switch_mlp.up_proj.weight",
    "model.layers.2.mlp.experts.down_proj": "model.layers.2.ffn.switch_mlp.down_proj.weight",
    "model.hc_head.hc_fn": "model.hc_head.fn",
    "head.weight": "lm_head.weight",
    # In three axes already, under DeepSeek's name and transformers'.
    "layers.3.attn.wo_a.weight": "model.layers.3.attn.wo_a.weight",
    "model.layers.3.self_attn.o_a_proj.weight": "model.layers.3.attn.wo_a.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_single_name_of_another_layout_is_understood(name: str) -> None:
    held = dense()
    held[name] = held.pop(NAMES[name])
    made = make_steps(held, SAMPLE, Options())
    assert made.problems == ()
    (step,) = (step for step in made.steps if step.sources[0].name == name)
    assert step.targets[0].name == NAMES[name]
    assert step.targets[0].spec.shape == held[name].shape


@pytest.mark.parametrize("quantize", [None, QuantSpec("affine", 8, 32)], ids=["as it is", "-q"])
def test_compressors_that_are_packed_stay_packed(quantize: QuantSpec | None) -> None:
    held = dense()
    rows, width = held.pop("model.layers.1.attn.compressor.wkv.weight").shape
    module = "layers.1.attn.compressor.wkv"
    held[f"{module}.weight"] = Spec((rows, width // 8), DType.U32)
    held |= {f"{module}.{part}": Spec((rows, width // 64), DType.BF16) for part in ("scales", "biases")}
    made = make_steps(held, SAMPLE, Options(quantize=quantize))
    assert made.problems == ()
    codecs = {target.label: target.codec for step in made.steps for target in step.targets}
    assert codecs["model.layers.1.attn.compressor.wkv"].native == Native(QuantSpec("affine", 4, 64))
    assert not codecs["model.layers.1.attn.compressor.wgate"].quantized
