"""Whatever lies in an MTP layer is dropped with that reason, and nothing in any other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from support import sample

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import Checkpoint, open_checkpoint
from mla_tools.names import NUMBER
from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan, steps_of
from mla_tools.samples import sample_config
from mla_tools.spec import DType, Spec

# Family -> the layer in which its sample has MTP tensors, and the tensor that shows it.
LAYERS = {
    "bailing_hybrid": ("model.layers.4", "eh_proj.weight"),
    "deepseek_v3": ("model.layers.4", "eh_proj.weight"),
    "deepseek_v32": ("model.layers.4", "eh_proj.weight"),
    "deepseek_v4": ("mtp.0", "attn.wkv.weight"),
    "glm4_moe_lite": ("model.layers.4", "eh_proj.weight"),
    "glm_moe_dsa": ("model.layers.4", "eh_proj.weight"),
    "kimi_k2": ("model.layers.4", "eh_proj.weight"),
    "kimi_k25": ("language_model.model.layers.4", "eh_proj.weight"),
    "kimi_vl": ("language_model.model.layers.4", "eh_proj.weight"),
}
# What no rule knows. Codes without a scale are in no format.
STRANGE = {
    "shared_head.extra.weight": Spec((3,), DType.BF16),
    "a.7.b.9.c": Spec((2, 2), DType.F32),
    "codes.weight": Spec((8, 8), DType.F8_E4M3),
    "packed.weight": Spec((8, 8), DType.U32),
    "packed.scales": Spec((8, 1), DType.BF16),
}


def with_tensors(found: Checkpoint, specs: Mapping[str, Spec], without: str = "") -> Checkpoint:
    """A checkpoint with more stored tensors, and maybe without one."""
    entry = next(iter(found.tensors.values()))
    more = {name: entry._replace(spec=spec) for name, spec in specs.items()}
    held = {name: stored for name, stored in found.tensors.items() if name != without}
    return replace(found, tensors={**held, **more})


def plan_of(found: Checkpoint) -> Plan:
    return make_plan(found, Options())


def marked(family: str) -> Checkpoint:
    """The sample of a family with an MTP layer, of which it need have no more than what shows it."""
    found = open_checkpoint(sample(family))
    layer, marker = LAYERS[family]
    if f"{layer}.{marker}" in found.tensors:
        return found
    return with_tensors(found, {f"{layer}.{marker}": Spec((256, 512), DType.BF16)})


@pytest.mark.parametrize("family", LAYERS)
def test_whatever_lies_in_an_mtp_layer_is_dropped_with_its_reason(family: str) -> None:
    found, (layer, marker) = marked(family), LAYERS[family]
    plain = plan_of(found)
    reasons = {drop.reason for drop in plain.drops if drop.source.name == f"{layer}.{marker}"}
    strange = {f"{layer}.{name}": spec for name, spec in STRANGE.items()}
    plan = plan_of(with_tensors(found, strange))
    assert {drop.reason for drop in plan.drops if drop.source.name in strange} == reasons
    assert {name for name in strange if name in {drop.source.name for drop in plan.drops}} == strange.keys()
    assert len(reasons) == 1
    assert plan.steps == plain.steps
    assert len(plan.drops) == len(plain.drops) + len(strange)


@pytest.mark.parametrize("family", LAYERS)
def test_without_what_shows_it_no_strange_tensor_is_dropped(family: str) -> None:
    layer, marker = LAYERS[family]
    strange = {f"{layer}.{name}": spec for name, spec in STRANGE.items()}
    found = with_tensors(marked(family), strange, without=f"{layer}.{marker}")
    with pytest.raises(CheckpointError) as caught:
        plan_of(found)
    said = {problem.subject for problem in caught.value.problems}
    assert {name.removesuffix(".weight") for name in strange} <= {
        name.removesuffix(".weight") for name in said
    }


@pytest.mark.parametrize("family", LAYERS)
def test_the_next_layer_is_shown_by_its_own_tensor_alone(family: str) -> None:
    layer, _ = LAYERS[family]
    prefix, number, _ = NUMBER.split(layer)
    name = f"{prefix}.{int(number) + 1}.strange.weight"
    with pytest.raises(CheckpointError) as caught:
        plan_of(with_tensors(marked(family), {name: Spec((3,), DType.BF16)}))
    assert [(problem.subject, problem.what) for problem in caught.value.problems] == [
        (name.removesuffix(".weight"), "unknown tensor")
    ]


@pytest.mark.parametrize("family", [family for family in LAYERS if "mtp" not in LAYERS[family][0]])
def test_a_layer_of_the_model_is_never_an_mtp_layer(family: str) -> None:
    layer, marker = LAYERS[family]
    real = f"{layer.removesuffix('4')}3"
    _, table = table_of(open_checkpoint(sample(family)).config)
    assert table.layer(f"{real}.strange.weight") is None
    assert table.layer(layer) is None
    assert table.layer(f"{layer}.strange.weight") is not None
    both = {
        f"{real}.{marker}": Spec((256, 512), DType.BF16),
        f"{real}.strange.weight": Spec((3,), DType.BF16),
    }
    with pytest.raises(CheckpointError) as caught:
        plan_of(with_tensors(marked(family), both))
    assert {(problem.subject, problem.what) for problem in caught.value.problems} == {
        (name.removesuffix(".weight"), "unknown tensor") for name in both
    }


def test_layers_that_a_wrong_number_cuts_off_are_no_mtp_layers() -> None:
    # Layer 3 is one of the model, and what the sample has in it is not dropped with layer 4.
    config = {**sample_config("deepseek_v3"), "num_hidden_layers": 3}
    strange = {"model.layers.3.strange.weight": Spec((3,), DType.BF16)}
    found = with_tensors(open_checkpoint(sample("deepseek_v3")), strange)
    with pytest.raises(CheckpointError, match=r"eh_proj beside it") as caught:
        plan_of(replace(found, config=config))
    unknown = [problem.subject for problem in caught.value.problems if problem.what == "unknown tensor"]
    assert unknown == ["model.layers.3.strange"]


def test_what_shows_a_layer_may_be_in_a_file_that_cannot_be_read() -> None:
    layer, marker = LAYERS["bailing_hybrid"]
    strange = {f"{layer}.strange.weight": Spec((3,), DType.BF16)}
    found = with_tensors(marked("bailing_hybrid"), strange, without=f"{layer}.{marker}")
    lost = replace(found, lost={f"{layer}.{marker}": "model-00002 is missing"})
    made = steps_of(lost, Options())
    assert [drop.source.name for drop in made.drops if drop.source.name in strange] == [*strange]


def test_the_norm_of_the_shared_head_of_ling_is_dropped() -> None:
    # Ling 3.0 on the hub has it beside final_layernorm.
    name = "model.layers.4.shared_head.norm.weight"
    found = with_tensors(open_checkpoint(sample("bailing_hybrid")), {name: Spec((256,), DType.BF16)})
    (drop,) = (drop for drop in plan_of(found).drops if drop.source.name == name)
    assert drop.reason.startswith("multi-token prediction, not part of the model's 4 layers")


def test_every_family_with_mtp_layers_is_here() -> None:
    known = {
        family
        for family in MODEL_TYPES
        if any(drop.whole for drop in table_of(sample_config(family))[1].drops)
    }
    assert known - {"joyai_llm_flash"} == LAYERS.keys()
