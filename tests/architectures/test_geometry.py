"""The numbers of a config: their labels, and everything that can be wrong with them, all at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.architectures import MODEL_TYPES, family_of, table_of
from mla_tools.architectures.geometry import Geometry, Num, label
from mla_tools.errors import CheckpointError
from mla_tools.samples import sample_config

A, B, C = Num(4, "a 4"), Num(3, "b 3"), Num(2, "c 2")

LABELS = [
    pytest.param(A, 4, "a 4", id="itself"),
    pytest.param(A + B, 7, "a 4 + b 3", id="sum"),
    pytest.param(A + 1, 5, "a 4 + 1", id="sum_with_a_number"),
    pytest.param(A * B, 12, "a 4 x b 3", id="product"),
    pytest.param(A * 2, 8, "a 4 x 2", id="product_with_a_number"),
    pytest.param(A * (B + C), 20, "a 4 x (b 3 + c 2)", id="product_of_a_sum"),
    pytest.param((A + B) * C, 14, "(a 4 + b 3) x c 2", id="sum_times"),
    pytest.param(A + B * C, 10, "a 4 + b 3 x c 2", id="sum_of_a_product"),
    pytest.param(A // C, 2, "a 4 / c 2", id="quotient"),
    pytest.param((A + C) // 2, 3, "(a 4 + c 2) / 2", id="quotient_of_a_sum"),
    pytest.param(17, 17, "17", id="plain"),
]


@pytest.mark.parametrize(("number", "value", "text"), LABELS)
def test_numbers_remember_what_they_were_made_of(number: int, value: int, text: str) -> None:
    assert number == value
    assert label(number) == text


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_numbers_are_ints(a: int, b: int) -> None:
    left, right = Num(a, "a"), Num(b, "b")
    assert (left + right, left * right, left // right) == (a + b, a * b, a // b)
    assert hash(left) == hash(a)
    assert list(range(left)) == list(range(a))
    assert (left, right) == (a, b)


WRONG = [
    pytest.param(None, "None", id="null"),
    pytest.param(True, "True", id="true"),
    pytest.param("8", "'8'", id="text"),
    pytest.param(8.0, "8.0", id="float"),
    pytest.param([8], "[8]", id="list"),
    pytest.param({}, "{}", id="object"),
    pytest.param(0, "0", id="zero"),
    pytest.param(-3, "-3", id="negative"),
    pytest.param((1 << 28) + 1, str((1 << 28) + 1), id="huge"),
    pytest.param(10**4000, "1000", id="four_thousand_digits"),
    pytest.param(float("nan"), "nan", id="nan"),
]


@pytest.mark.parametrize(("value", "shown"), WRONG)
def test_a_number_that_is_none_is_a_problem_that_shows_it(value: object, shown: str) -> None:
    g = Geometry({"hidden_size": value})
    assert g.dim("hidden_size") == 1  # so that the rest of the table can be looked at
    (problem,) = g.problems
    assert problem.subject == "config.json"
    assert "hidden_size" in problem.what
    assert problem.found.startswith("no such key" if value is None else shown)
    assert len(str(problem)) < 300


def test_limits_are_allowed_themselves() -> None:
    g = Geometry({"a": 1, "b": 1 << 28, "c": 0})
    assert (g.dim("a"), g.dim("b"), g.dim("c", least=0)) == (1, 1 << 28, 0)
    assert g.problems == []


def test_a_default_stands_for_a_missing_key_and_for_null_but_not_for_nonsense() -> None:
    g = Geometry({"null": None, "bad": "x"})
    assert g.dim("absent", 7) == 7
    assert g.dim("null", 7) == 7
    assert label(g.dim("absent", 7)) == "absent 7"
    assert g.problems == []
    g.dim("bad", 7)
    assert [problem.found for problem in g.problems] == ["'x'"]


def test_all_problems_are_collected() -> None:
    g = Geometry({"a": -1, "b": "x", "flag": "yes", "inner": {"d": True}, "list": [1, 99]})
    g.dim("a")
    g.dim("b")
    g.dim("c")
    g.flag("flag")
    inner = g.section("inner")
    inner.dim("d")
    inner.dim("e")
    g.section("absent")
    g.section("a").dim("f")
    g.numbers("list", below=4)
    named = [problem.what.split()[0] for problem in g.problems]
    assert named == ["a", "b", "c", "flag", "d", "e", "absent", "a", "f", "list"]


@pytest.mark.parametrize(("value", "wanted"), [(None, None), (0, None), (512, 512)])
def test_an_optional_number_may_be_absent_null_or_zero(value: int | None, wanted: int | None) -> None:
    assert Geometry({"q_lora_rank": value}).optional("q_lora_rank") == wanted
    assert Geometry({}).optional("q_lora_rank") is None


@pytest.mark.parametrize("value", [-1, "1536", True, False, "", [], 1.5])
def test_an_optional_number_of_another_type_is_a_problem(value: object) -> None:
    g = Geometry({"q_lora_rank": value})
    g.optional("q_lora_rank")
    assert len(g.problems) == 1


@pytest.mark.parametrize("value", [1, 0, "false", None, []])
def test_a_flag_is_true_or_false(value: object) -> None:
    g = Geometry({"attention_bias": value})
    assert g.flag("attention_bias", True) is True
    (problem,) = g.problems
    assert problem.needed == "true or false"
    assert Geometry({"attention_bias": True}).flag("attention_bias") is True


LISTS = [
    pytest.param([1, 2, 3], {1, 2, 3}, id="first_to_last"),
    pytest.param([], set(), id="empty"),
    pytest.param([0, 1], None, id="counted_from_0"),
    pytest.param([1, 5], None, id="beyond_the_last"),
    pytest.param([1, -1], None, id="negative"),
    pytest.param([True], None, id="bool"),
    pytest.param(["1"], None, id="text"),
    pytest.param([1.0], None, id="float"),
    pytest.param(3, None, id="number"),
    pytest.param(None, None, id="null"),
    pytest.param(list(range(1, 10**5)), None, id="long"),
]


@pytest.mark.parametrize(("value", "wanted"), LISTS)
def test_layer_lists_count_from_1(value: object, wanted: set[int] | None) -> None:
    g = Geometry({"kda_layers": value})
    assert g.numbers("kda_layers", below=4) == (wanted or set())
    assert [problem.needed for problem in g.problems] == (
        ["a list of integers from 1 to 4"] if wanted is None else []
    )
    assert all(len(problem.found) <= 80 for problem in g.problems)


MOE: list[Any] = [
    pytest.param({}, [0, 1, 2, 3, 4, 5], id="all"),
    pytest.param({"first_k_dense_replace": 2}, [2, 3, 4, 5], id="first_dense"),
    pytest.param({"moe_layer_freq": 2}, [0, 2, 4], id="every_second"),
    pytest.param({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4], id="both"),
    pytest.param({"first_k_dense_replace": 6}, [], id="all_dense"),
    pytest.param({"first_k_dense_replace": 600}, [], id="more_dense_than_layers"),
    pytest.param({"moe_layer_freq": None, "first_k_dense_replace": None}, [0, 1, 2, 3, 4, 5], id="null"),
    pytest.param({"n_routed_experts": None}, [], id="no_experts"),
    pytest.param({"n_routed_experts": 0}, [], id="zero_experts"),
]


@pytest.mark.parametrize(("keys", "sparse"), MOE)
def test_layers_with_experts(keys: dict[str, Any], sparse: list[int]) -> None:
    g = Geometry({"num_hidden_layers": 6, "n_routed_experts": 8, **keys})
    dense, found = g.moe_layers()
    assert sorted(found) == sparse
    assert sorted(dense) == [layer for layer in range(6) if layer not in sparse]
    assert g.problems == []


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_hidden_layers": "six"}, "num_hidden_layers"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"moe_layer_freq": 0}, "moe_layer_freq"),
        ({"moe_layer_freq": [1, 0, 1]}, "moe_layer_freq"),
    ],
)
def test_a_wrong_number_among_those_of_the_experts_is_named(keys: dict[str, Any], named: str) -> None:
    g = Geometry({"num_hidden_layers": 6, "n_routed_experts": 8, **keys})
    g.moe_layers()
    assert [problem.what.split()[0] for problem in g.problems] == [named]


def test_an_absurd_number_of_layers_is_a_problem_and_costs_nothing() -> None:
    g = Geometry({"num_hidden_layers": 10**12})
    assert list(g.layers()) == [0]
    assert len(g.problems) == 1


def test_more_layers_than_any_model_has_are_not_silently_fewer() -> None:
    g = Geometry({"num_hidden_layers": 20_000})
    assert len(g.layers()) == 20_000 or g.problems


# --- families ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_damaged_number_of_a_config_is_listed_at_once(family: str) -> None:
    config = sample_config(family)
    nested = "text_config" in config
    numbers = dict(config["text_config"] if nested else config)
    damage = {"vocab_size": "x", "hidden_size": -1, "num_attention_heads": True, "v_head_dim": 10**30}
    # DeepSeek V4.1 has no latent of its own width.
    if family == "minicpm3":
        damage.pop("v_head_dim")  # it follows from the others
    damaged = [key for key in (*damage, "kv_lora_rank") if key in numbers]
    numbers |= {key: value for key, value in damage.items() if key in numbers}
    numbers.pop("kv_lora_rank", None)
    with pytest.raises(CheckpointError) as caught:
        table_of({**config, "text_config": numbers} if nested else numbers)
    assert sorted(problem.what.split()[0] for problem in caught.value.problems) == sorted(damaged)


def test_kimi_linear_layer_lists_out_of_range_are_a_problem() -> None:
    sample = sample_config("kimi_linear")
    sample["linear_attn_config"] = {**sample["linear_attn_config"], "kda_layers": [0, 1, 5]}
    with pytest.raises(CheckpointError, match="from 1 to 4"):
        table_of(sample)


def test_kimi_linear_counts_its_layers_from_1() -> None:
    sample = sample_config("kimi_linear")
    _, table = table_of(sample)
    kinds = {
        layer: next(kind for kind in ("A_log", "kv_b_proj.weight")
                    if table.lookup(f"model.layers.{layer}.self_attn.{kind}"))
        for layer in range(4)
    }  # fmt: skip
    assert kinds == {0: "A_log", 1: "A_log", 2: "A_log", 3: "kv_b_proj.weight"}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_family_is_known_by_its_model_type(family: str) -> None:
    found = MODEL_TYPES[family]
    inner = {found.section: {"model_type": found.inside[0]} if found.inside else {}} if found.section else {}
    assert family_of({"model_type": family, **inner}) is found


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("DeepseekV2ForCausalLM", "deepseek_v2"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("DeepseekV32ForCausalLM", "deepseek_v32"),
        ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
        ("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        ("KimiLinearForCausalLM", "kimi_linear"),
        ("KimiVLForConditionalGeneration", "kimi_vl"),
        ("LongcatFlashForCausalLM", "longcat_flash"),
        ("LongcatFlashNgramForCausalLM", "longcat_flash_ngram"),
    ],
)
def test_a_config_without_a_model_type_is_known_by_its_class(architecture: str, family: str) -> None:
    assert family_of({"architectures": [architecture]}) is MODEL_TYPES[family]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "mistral3"},
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
        {"model_type": ["deepseek_v3"]},
        {"architectures": "DeepseekV3ForCausalLM"},
        {"architectures": [None]},
        {"model_type": "llama", "architectures": ["DeepseekV3ForCausalLM"]},
    ],
)
def test_other_configs_are_refused_with_what_is_known(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        family_of(config)
    if config.get("model_type") == "mistral3":
        assert "mistral3 with a text_config of model_type mistral4" in str(caught.value)
    else:
        assert all(family in str(caught.value) for family in MODEL_TYPES)


@pytest.mark.parametrize("given", [["BailingMoeV2_5ForCausalLM"], "BailingMoeV2_5ForCausalLM", {"a": 1}])
def test_ling_2_5_is_refused_by_its_architecture(given: object) -> None:
    config = {**sample_config("bailing_hybrid"), "architectures": given}
    with pytest.raises(CheckpointError, match="architecture BailingMoeV3ForCausalLM") as caught:
        table_of(config)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "given",
    [{}, {"architectures": None}, {"architectures": []}, {"architectures": "BailingMoeV3ForCausalLM"}],
)
def test_the_config_of_ling_3_names_the_architecture_that_mlx_lm_goes_by(given: dict[str, Any]) -> None:
    sample = sample_config("bailing_hybrid")
    config = {key: value for key, value in sample.items() if key != "architectures"} | given
    family, _ = table_of(config)
    assert family.rewritten(config)["architectures"] == ["BailingMoeV3ForCausalLM"]


@pytest.mark.parametrize(
    ("alias", "family"),
    [("joyai_llm_flash", "deepseek_v3"), ("deepseek_v41_text", "deepseek_v41"), ("youtu", "youtu_llm")],
)
def test_a_second_name_is_written_as_the_one_of_mlx_lms_class(alias: str, family: str) -> None:
    config = {**sample_config(family), "model_type": alias}
    found, _ = table_of(config)
    assert found is MODEL_TYPES[family]
    assert found.rewritten(config)["model_type"] == family
