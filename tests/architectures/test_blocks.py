"""The shared pieces and the tables of the families, against mlx-lm's classes and the reference shapes."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mla_tools.architectures import MODEL_TYPES, blocks, deepseek_v3, table_of
from mla_tools.architectures.geometry import Geometry, Num, label
from mla_tools.errors import CheckpointError
from mla_tools.ops import SplitKvB, Stack
from mla_tools.rules import Drop, Route, Rule
from mla_tools.samples import sample_config
from mla_tools.verify.child import model_classes

each_family = pytest.mark.parametrize("family", MODEL_TYPES)

ATTENTION = {
    "hidden_size": 10,
    "num_attention_heads": 2,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 3,
    "v_head_dim": 5,
    "kv_lora_rank": 7,
    "q_lora_rank": 6,
    "attention_bias": False,
}
WHERE = {"l": range(2)}
PREFIX = "model.layers.{l}.self_attn"


def routes(rules: list[Rule]) -> list[Route]:
    return [route for rule in rules for route in rule.hub_routes()]


def shapes(rules: list[Rule]) -> dict[str, tuple[int, ...]]:
    return {
        text.removeprefix(f"{PREFIX}."): tuple(map(int, shape))
        for route in routes(rules)
        for text, shape in zip(route.source, route.shapes, strict=True)
    }


def model_of(family: str, **keys: Any) -> Any:
    found = MODEL_TYPES[family]
    config = found.rewritten({**sample_config(family), **keys})
    model_class, args_class = model_classes(config)
    return model_class(args_class.from_dict(config))


def text(family: str, **keys: Any) -> dict[str, Any]:
    return {"text_config": {**sample_config(family)["text_config"], **keys}}


K3_KDA = sample_config("kimi_k3")["text_config"]["linear_attn_config"]

# Keys that change which tensors there are.
VARIANTS: list[Any] = [
    *(pytest.param(family, {}, id=family) for family in MODEL_TYPES),
    pytest.param("bailing_hybrid", {"q_lora_rank": 64}, id="bailing_hybrid-q_lora_rank"),
    pytest.param("bailing_hybrid", {"tie_word_embeddings": True}, id="bailing_hybrid-tied"),
    pytest.param("bailing_hybrid", {"layer_group_size": 3}, id="bailing_hybrid-unfinished_group"),
    pytest.param(
        "bailing_hybrid", {"layer_group_size": 1, "first_k_dense_replace": 0}, id="bailing_hybrid-mla"
    ),
    pytest.param("deepseek_v2", {"q_lora_rank": 64}, id="deepseek_v2-q_lora_rank"),
    pytest.param("deepseek_v3", {"q_lora_rank": None}, id="deepseek_v3-no_q_lora_rank"),
    pytest.param("deepseek_v3", {"attention_bias": True}, id="deepseek_v3-attention_bias"),
    pytest.param("deepseek_v3", {"first_k_dense_replace": 0, "moe_layer_freq": 2}, id="deepseek_v3-freq"),
    pytest.param("deepseek_v3", {"first_k_dense_replace": 4}, id="deepseek_v3-all_dense"),
    pytest.param("deepseek_v3", {"n_routed_experts": None}, id="deepseek_v3-no_experts"),
    pytest.param("deepseek_v3", {"n_shared_experts": None}, id="deepseek_v3-no_shared_experts"),
    pytest.param("deepseek_v3", {"n_shared_experts": 3}, id="deepseek_v3-three_shared_experts"),
    pytest.param("deepseek_v3", {"qk_nope_head_dim": 32, "v_head_dim": 96}, id="deepseek_v3-unlike_heads"),
    pytest.param("deepseek_v41", text("deepseek_v41", kv_source_layer_ids=[1]), id="deepseek_v41-sources"),
    pytest.param("deepseek_v41", text("deepseek_v41", o_groups=4), id="deepseek_v41-groups"),
    pytest.param("deepseek_v4", {"num_hash_layers": 0}, id="deepseek_v4-no_hash_layers"),
    pytest.param("deepseek_v4", {"num_hash_layers": 9}, id="deepseek_v4-all_hash_layers"),
    pytest.param("deepseek_v4", {"compress_ratios": [0, 0, 0, 0]}, id="deepseek_v4-no_compressor"),
    pytest.param("deepseek_v4", {"compress_ratios": [128] * 4}, id="deepseek_v4-no_indexer"),
    pytest.param("deepseek_v4", {"o_groups": 4, "n_shared_experts": 2}, id="deepseek_v4-groups"),
    pytest.param("glm4_moe_lite", {"q_lora_rank": None}, id="glm4_moe_lite-no_q_lora_rank"),
    pytest.param("kimi_k3", text("kimi_k3", tie_word_embeddings=True), id="kimi_k3-tied"),
    pytest.param("kimi_k3", text("kimi_k3", q_lora_rank=None), id="kimi_k3-no_q_lora_rank"),
    pytest.param("kimi_k3", text("kimi_k3", mla_use_output_gate=False), id="kimi_k3-no_output_gate"),
    pytest.param("kimi_k3", text("kimi_k3", attn_res_block_size=None), id="kimi_k3-no_residuals"),
    pytest.param("kimi_k3", text("kimi_k3", routed_expert_hidden_size=None), id="kimi_k3-no_latent"),
    pytest.param("kimi_k3", text("kimi_k3", latent_moe_use_norm=False), id="kimi_k3-no_latent_norm"),
    pytest.param("kimi_k3", text("kimi_k3", num_shared_experts=0), id="kimi_k3-no_shared_experts"),
    pytest.param(
        "kimi_k3",
        text("kimi_k3", linear_attn_config={**K3_KDA, "use_full_rank_gate": False}),
        id="kimi_k3-low_rank_gate",
    ),
    pytest.param(
        "kimi_k3",
        text("kimi_k3", linear_attn_config={**K3_KDA, "num_heads": 96}),
        id="kimi_k3-more_heads_than_head_dim",
    ),
    pytest.param("kimi_linear", {"tie_word_embeddings": True}, id="kimi_linear-tied"),
    pytest.param("kimi_linear", {"num_shared_experts": 0}, id="kimi_linear-no_shared_experts"),
    pytest.param("kimi_linear", {"first_k_dense_replace": 0, "moe_layer_freq": 3}, id="kimi_linear-freq"),
    pytest.param("longcat_flash", {"router_bias": True}, id="longcat_flash-router_bias"),
    pytest.param("minicpm3", {"tie_word_embeddings": False}, id="minicpm3-untied"),
    pytest.param("youtu_llm", {"tie_word_embeddings": False}, id="youtu_llm-untied"),
    pytest.param("youtu_llm", {"q_lora_rank": None}, id="youtu_llm-no_q_lora_rank"),
    pytest.param("mistral4", {"tie_word_embeddings": True}, id="mistral4-tied"),
    pytest.param("mistral4", {"first_k_dense_replace": 2}, id="mistral4-dense_layers"),
    pytest.param("mistral4", {"first_k_dense_replace": 9}, id="mistral4-all_dense"),
    pytest.param("longcat_flash", {"attention_bias": True}, id="longcat_flash-attention_bias"),
    pytest.param("longcat_flash_ngram", {"emb_split_num": 4, "emb_neighbor_num": 2}, id="ngram-tables"),
]


@pytest.mark.parametrize(("family", "keys"), VARIANTS)
def test_the_targets_of_a_table_are_the_parameters_of_mlx_lms_class(
    family: str, keys: dict[str, Any]
) -> None:
    _, table = table_of({**sample_config(family), **keys})
    declared = {name: array.shape for name, array in tree_flatten(model_of(family, **keys).parameters())}
    made = {name: tuple(map(int, shape)) for name, (shape, _) in table.targets().items()}
    assert made == declared


@each_family
def test_what_can_be_quantized_is_what_mlx_lms_class_can_quantize(family: str) -> None:
    model = model_of(family)
    can = {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    targets = sample_targets(family)
    assert {name for name, (_, param) in targets.items() if param.quantizable} == can


@each_family
def test_the_widths_that_a_class_prescribes_are_those_of_the_table(family: str) -> None:
    model = model_of(family)
    predicate = getattr(model, "quant_predicate", None)
    wanted = {}
    for path, module in model.named_modules():
        if predicate is not None and hasattr(module, "to_quantized"):
            answer = predicate(path, module)
            if isinstance(answer, dict):
                wanted[f"{path}.weight"] = (answer["bits"], answer["group_size"])
    targets = sample_targets(family)
    prescribed = {
        name: (param.spec.bits, param.spec.group_size)
        for name, (_, param) in targets.items()
        if param.spec is not None
    }
    assert prescribed == wanted


@each_family
def test_what_a_class_leaves_unquantized_is_what_the_table_says(family: str) -> None:
    model = model_of(family)
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    modules = [pair for pair in model.named_modules() if hasattr(pair[1], "to_quantized")]
    wanted = {f"{path}.weight" for path, module in modules if predicate(path, module) is False}
    assert {name for name, (_, param) in sample_targets(family).items() if param.unquantized} == wanted


@each_family
def test_what_keeps_its_dtype_is_what_mlx_lms_class_says(family: str) -> None:
    predicate = getattr(model_of(family), "cast_predicate", None)
    targets = sample_targets(family)
    kept = {name for name, (_, param) in targets.items() if not param.cast}
    assert kept == {name for name in targets if predicate is not None and not predicate(name)}


def sample_targets(family: str) -> dict[str, Any]:
    _, table = table_of(sample_config(family))
    return dict(table.targets())


def test_attention_with_a_query_rank() -> None:
    assert shapes(blocks.mla_attention(Geometry(ATTENTION), WHERE)) == {
        "q_a_proj.weight": (6, 10),
        "q_a_layernorm.weight": (6,),
        "q_b_proj.weight": (2 * (4 + 3), 6),
        "kv_a_proj_with_mqa.weight": (7 + 3, 10),
        "kv_a_layernorm.weight": (7,),
        "kv_b_proj.weight": (2 * (4 + 5), 7),
        "o_proj.weight": (10, 2 * 5),
    }


def test_attention_without_a_query_rank_has_one_q_proj() -> None:
    found = shapes(blocks.mla_attention(Geometry({**ATTENTION, "q_lora_rank": None}), WHERE))
    assert found["q_proj.weight"] == (2 * (4 + 3), 10)
    assert not [name for name in found if name.startswith(("q_a", "q_b"))]


def test_attention_biases() -> None:
    found = shapes(blocks.mla_attention(Geometry({**ATTENTION, "attention_bias": True}), WHERE))
    biases = {name: shape for name, shape in found.items() if name.endswith(".bias")}
    assert biases == {
        "q_a_proj.bias": (6,),
        "kv_a_proj_with_mqa.bias": (7 + 3,),
        "o_proj.bias": (10,),
    }


def test_the_split_of_kv_b_fits_mlx_lms_module() -> None:
    rules = blocks.mla_attention(Geometry(ATTENTION), WHERE)
    (split,) = [rule for rule in routes(rules) if isinstance(rule.op, SplitKvB)]
    assert split.op == SplitKvB(4, 5)
    wanted = [MultiLinear(4, 7, 2).weight.shape, MultiLinear(7, 5, 2).weight.shape]
    assert [tuple(map(int, shape)) for shape in split.target_shapes()] == wanted
    whole = blocks.mla_attention(Geometry(ATTENTION), WHERE, split=False)
    assert not [rule for rule in routes(whole) if isinstance(rule.op, SplitKvB)]


def test_the_fused_shape_says_which_numbers_made_it() -> None:
    rules = blocks.mla_attention(Geometry(ATTENTION), WHERE)
    (split,) = [rule for rule in routes(rules) if isinstance(rule.op, SplitKvB)]
    rows, rank = split.shapes[0]
    assert label(rows) == "num_attention_heads 2 x (qk_nope_head_dim 4 + v_head_dim 5)"
    assert label(rank) == "kv_lora_rank 7"


def test_experts_are_stacked_under_mlx_lms_names() -> None:
    count = Num(3, "n_routed_experts 3")
    rules = routes(
        blocks.experts("m.{l}.experts", "m.{l}.switch_mlp", count, 10, 4, WHERE, ("w1", "w3", "w2"))
    )
    pairs = {(rule.source[0], rule.target[0]): rule.target_shapes()[0] for rule in rules}
    up, down = SwitchLinear(10, 4, 3).weight.shape, SwitchLinear(4, 10, 3).weight.shape
    assert pairs == {
        ("m.{l}.experts.{e}.w1.weight", "m.{l}.switch_mlp.gate_proj.weight"): up,
        ("m.{l}.experts.{e}.w3.weight", "m.{l}.switch_mlp.up_proj.weight"): up,
        ("m.{l}.experts.{e}.w2.weight", "m.{l}.switch_mlp.down_proj.weight"): down,
    }
    assert all(isinstance(rule.op, Stack) for rule in rules)
    assert all(rule.because == "n_routed_experts = 3 in config.json" for rule in rules)


def test_linear_layers_take_their_bias_along() -> None:
    weight, bias = routes(blocks.linear("a", (3, 2), {}, "b", bias=True))
    assert (weight.source, weight.target, weight.shapes) == (("a.weight",), ("b.weight",), ((3, 2),))
    assert (bias.source, bias.target, bias.shapes) == (("a.bias",), ("b.bias",), ((3,),))
    assert weight.param.quantizable
    assert not bias.param.quantizable


@pytest.mark.parametrize("layer", [4, 5, 9])
def test_mtp_layers_are_everything_beyond_the_last_layer(layer: int) -> None:
    _, table = table_of(sample_config("deepseek_v3"))
    own = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")
    attention = ("input_layernorm", "self_attn.kv_b_proj", "self_attn.q_a_layernorm")
    experts = ("mlp.gate", "mlp.experts.7.up_proj", "mlp.shared_experts.down_proj")
    for inside in own + attention + experts:
        match = table.lookup(f"model.layers.{layer}.{inside}.weight")
        assert match is not None, inside
        assert table.route(match) is None
        assert "4 layers" in table.drop(match).reason
        assert table.drop(match).marker == "model.layers.{l}.eh_proj.weight"
    assert table.lookup("model.layers.3.eh_proj.weight") is None
    assert table.lookup(f"model.layers.{layer}.mlp.experts.8.up_proj.weight") is None


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_linear"])
def test_rotary_buffers_are_dropped(family: str) -> None:
    _, table = table_of(sample_config(family))
    match = table.lookup("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert match is not None
    assert "rope_theta" in table.drop(match).reason
    assert table.shape(match) == (16,)


@pytest.mark.parametrize("family", ["kimi_k25", "kimi_k3"])
def test_the_vision_encoder_of_the_kimi_models_is_dropped_by_name(family: str) -> None:
    _, table = table_of(sample_config(family))
    tower = ("encoder.blocks.26.mlp.fc1.bias", "encoder.final_layernorm.weight", "patch_embed.pos_emb.weight")
    for name in (*(f"vision_tower.{name}" for name in tower), "mm_projector.proj.2.bias"):
        match = table.lookup(name)
        assert match is not None, name
        assert table.drop(match).reason.startswith("vision ")
        assert table.shape(match) is None
    assert table.lookup("vision_towers.encoder.blocks.0.attn.weight") is None


def test_the_decay_of_kimi_k3_is_padded_to_the_length_of_a_head() -> None:
    config = sample_config("kimi_k3")
    _, table = table_of(config)
    name = "language_model.model.layers.0.self_attn.A_log"
    match = table.lookup(name)
    assert match is not None
    assert table.shape(match) == (64,)
    assert table.targets()[name][0] == (4,)
    # A converted checkpoint has the 4 alone, under the same name.
    there = table.lookup(name, (4,))
    assert there is not None
    route = table.route(there)
    assert route is not None
    assert (route.layouts, route.shapes) == (("mlx",), ((4,),))


# --- names -------------------------------------------------------------------------------------------


def names(table: tuple[list[Rule], list[Drop]]) -> tuple[set[str], set[str], set[str]]:
    """Return the templates of what is read, of what the model has, and of what is dropped, markers too."""
    rules, drops = table
    return (
        {text for rule in rules for form in rule.forms for text in form.source},
        {text for rule in rules for text in rule.target},
        {text for drop in drops for text in (drop.source, drop.marker) if text},
    )


def test_the_hubs_names_are_other_ones_in_rules_and_drops() -> None:
    table = deepseek_v3.decoder(Geometry(sample_config("deepseek_v3")))
    given, found = names(table), names(blocks.renamed(table, hub={"o_proj": "out_proj", "eh_proj": "joint"}))
    for before, after in zip((given[0], given[2]), (found[0], found[2]), strict=True):
        assert before != after
        wanted = {text.replace(".o_proj.", ".out_proj.").replace(".eh_proj.", ".joint.") for text in before}
        assert after == wanted
    assert found[1] == given[1]


def test_the_names_of_the_class_are_other_ones_in_targets_alone() -> None:
    table = deepseek_v3.decoder(Geometry(sample_config("deepseek_v3")))
    given = names(table)
    found = names(blocks.renamed(table, model={"mlp.switch_mlp": "moe.experts", "mlp": "ffn"}))
    assert (found[0], found[2]) == (given[0], given[2])
    assert found[1] == {
        text.replace(".mlp.switch_mlp.", ".moe.experts.").replace(".mlp.", ".ffn.") for text in given[1]
    }


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"proj": "high", "u": "v"}, "a.up_proj.up.weight"),
        ({"a": "b", "up_proj": "a"}, "b.a.up.weight"),
        ({"a.up_proj": "x.y.z"}, "x.y.z.up.weight"),
        ({"weight": "kernel"}, "a.up_proj.up.kernel"),
        ({"A": "b", ".": "-"}, "a.up_proj.up.weight"),
    ],
    ids=["not_within_a_component", "each_once", "several_components", "the_last", "no_such_name"],
)
def test_whole_components_of_names_are_renamed(change: dict[str, str], wanted: str) -> None:
    rules, _ = blocks.renamed(([Rule.of("a.up_proj.up.weight", "t", (1,))], []), hub=change)
    (rule,) = rules
    assert (rule.forms[0].source, rule.target) == ((wanted,), ("t",))


V41_DROPS = {
    "vision.blocks.31.attn.wqkv.bias": "vision tensor",
    "aligner.w2.weight": "vision tensor",
    "image_newline": "vision tensor",
    "layers.3.ffn.gate.bias_vl": "vision tensor",
    "layers.1.engram.embed.weight": "engram memory, which mlx-lm's model class cannot run",
    "layers.1.engram.q_weight": "engram memory",
    "mtp.2.markov_head.embed.weight": "multi-token prediction",
    "mtp.0.attn.wo_a.weight": "multi-token prediction",
    "mtp.0.ffn.experts.127.w2.weight": "multi-token prediction",
    "mtp.0.hc_attn_fn": "multi-token prediction",
}


@pytest.mark.parametrize("name", V41_DROPS)
def test_what_mlx_lm_cannot_run_of_deepseek_v41_is_dropped_by_name(name: str) -> None:
    _, table = table_of(sample_config("deepseek_v41"))
    match = table.lookup(name)
    assert match is not None
    assert table.route(match) is None
    assert V41_DROPS[name] in table.drop(match).reason


def test_deepseek_v41_with_engram_memory_is_refused_as_mlx_lm_refuses_it() -> None:
    keys = text("deepseek_v41", engram_layer_ids=[1])
    with pytest.raises(ValueError, match="engram"):
        model_of("deepseek_v41", **keys)
    with pytest.raises(CheckpointError, match=r"engram_layer_ids \[1\]"):
        table_of({**sample_config("deepseek_v41"), **keys})


@pytest.mark.parametrize("family", ["deepseek_v41", "kimi_k3"])
def test_the_numbers_may_stand_at_the_top(family: str) -> None:
    sample = sample_config(family)
    flat = {**sample["text_config"], "model_type": family}
    assert table_of(flat)[1].targets() == table_of(dict(sample))[1].targets()
    assert "text_config" not in MODEL_TYPES[family].rewritten(flat)


@pytest.mark.parametrize("family", ["deepseek_v41", "kimi_k3"])
@pytest.mark.parametrize("given", [7, [], "x"])
def test_a_text_config_that_is_no_object_is_refused(family: str, given: object) -> None:
    with pytest.raises(CheckpointError, match="text_config cannot be used"):
        table_of({**sample_config(family), "text_config": given})


def test_rope_parameters_inside_a_text_config_become_what_the_class_reads() -> None:
    family = MODEL_TYPES["deepseek_v41"]
    numbers = dict(sample_config("deepseek_v41")["text_config"])
    wanted = {"rope_theta": numbers.pop("rope_theta"), "rope_scaling": numbers.pop("rope_scaling")}
    numbers["rope_parameters"] = {**wanted["rope_scaling"], "rope_theta": wanted["rope_theta"]}
    found = family.rewritten({**sample_config("deepseek_v41"), "text_config": numbers})["text_config"]
    assert {key: found[key] for key in wanted} == wanted


def test_deepseek_v41_needs_a_ratio_for_each_layer() -> None:
    with pytest.raises(CheckpointError, match="at least 4 numbers"):
        table_of({**sample_config("deepseek_v41"), **text("deepseek_v41", compress_ratios=[0])})
    with pytest.raises(CheckpointError, match="from 0 to 3"):
        table_of({**sample_config("deepseek_v41"), **text("deepseek_v41", kv_source_layer_ids=[4])})
