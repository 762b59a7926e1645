"""DeepSeek V4 from every layout of the hub: what arrives, what its bits are, what the model makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conversion import convert
from layouts_v4 import GAPS, LAYOUTS, decoded_fp4, decoded_fp8, truth, write
from mlx_lm.utils import load_model
from pairs import ONLY_IN_ALL, pairs, product
from reference_v4 import CONFIGS, Arrays, reference, relative, tokens
from safetensors.torch import load_file, save_file
from support import loaded

from mla_tools.architectures import table_of
from mla_tools.cli import main
from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.models.bundle import bundled
from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan, make_steps
from mla_tools.weights import sanitize

# As the model's own: float32 has 6e-8, and after 6 layers the logits of both lie about 1e-6 apart.
TOLERANCE = 1e-5
LENGTH = 300
# A prompt in pieces, and then token by token.
CALLS = [50, 7, 4, 3, *[1] * 8, 120, *[1] * 4, 104]

# MLX multiplies with global scales on a GPU only.
FLAGS = {"nvfp4": ["--q-override", "switch_mlp=float"]}

Sources = Callable[[str, str], tuple[Path, Arrays]]
Stored = dict[str, torch.Tensor]

in_8_bits = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "indexer.wq_b", "shared_experts")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    made: dict[tuple[str, str], tuple[Path, Arrays]] = {}

    def folder(layout: str, config: str = "plain") -> tuple[Path, Arrays]:
        if (layout, config) not in made:
            place = tmp_path_factory.mktemp("layouts") / "source"
            made[layout, config] = place, write(reference(config), layout, place)
        return made[layout, config]

    return folder


def stored(folder: Path) -> Stored:
    return load_file(folder / "model.safetensors")


def octets(array: mx.array | torch.Tensor) -> np.ndarray[Any, Any]:
    if isinstance(array, torch.Tensor):
        return array.contiguous().view(torch.uint8).numpy().reshape(-1)
    return np.array(mx.contiguous(array).view(mx.uint8)).reshape(-1)


def parts_of(held: Stored, module: str, *names: str) -> Stored:
    return {name: held[f"{module}.{name}"] for name in names}


# ---- the model


# How a layout stores a weight and how positions are rotated have nothing to do with each other.
PAIRS = pairs(LAYOUTS, CONFIGS, [("official", "plain"), ("official", "yarn")], times=1)


@cache
def undecoded(config: str) -> np.ndarray[Any, Any]:
    return reference(config).logits(tokens(LENGTH))


@pytest.mark.parametrize(("layout", "config"), product(LAYOUTS, CONFIGS, PAIRS))
def test_the_logits_are_those_of_transformers(
    layout: str, config: str, sources: Sources, tmp_path: Path
) -> None:
    source, numbers = sources(layout, config)
    ids = tokens(LENGTH)
    # Most layouts hold the numbers of the reference itself.
    as_drawn = numbers is reference(config).weights
    wanted = undecoded(config) if as_drawn else truth(reference(config), numbers, ids)
    convert(source, tmp_path / "out", "--dtype", "float32", *FLAGS.get(layout, []))
    model, _ = load_model(tmp_path / "out", strict=True, trust_remote_code=True)
    assert relative(np.array(model(mx.array([ids])))[0], wanted) <= TOLERANCE
    cache, parts, start = model.make_cache(), [], 0
    for size in CALLS:
        parts.append(np.array(model(mx.array([ids[start : start + size]]), cache=cache))[0])
        start += size
    assert start == LENGTH
    assert relative(np.concatenate(parts), wanted) <= TOLERANCE


@pytest.mark.parametrize("layout", ["official", "base", "nvfp4", "dialect-a", "dialect-c"])
def test_mlx_vlm_reads_the_same_weights(layout: str, sources: Sources, tmp_path: Path) -> None:
    from mlx_vlm.utils import load_model as load_in_mlx_vlm

    out = tmp_path / "out"
    convert(sources(layout, "plain")[0], out, "--dtype", "float32", *FLAGS.get(layout, []))
    ours, _ = load_model(out, strict=True, trust_remote_code=True)
    ids = mx.array([tokens(LENGTH)])
    # mlx-vlm follows model_file too, and without that key takes its own class.
    assert relative(np.array(load_in_mlx_vlm(out)(ids)), np.array(ours(ids))) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_file"}))
    theirs = load_in_mlx_vlm(out)
    found = theirs(ids, cache=theirs.language_model.make_cache()).logits
    assert relative(np.array(ours(ids)), np.array(found)) <= TOLERANCE


def test_sanitize_makes_the_same_of_a_dict_of_arrays(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("official", "plain")
    convert(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    made = sanitize(mx.load(str(source / "model.safetensors")), config)
    written = loaded(tmp_path / "out")
    assert made.keys() == written.keys()
    for name, array in written.items():
        assert (array.dtype, array.shape) == (made[name].dtype, made[name].shape), name
        assert mx.array_equal(array, made[name]).item(), name


# ---- bits


def test_every_bit_of_the_official_layout_arrives(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("official", "plain")
    plan = convert(source, tmp_path / "out")
    held, out = stored(source), loaded(tmp_path / "out")
    assert {target.exactness for step in plan.steps for target in step.targets} == {"copied", "repacked"}
    experts = blocks = 0
    for step in plan.steps:
        (target,) = step.targets
        path = target.name.removesuffix(".weight")
        modules = [found.name.removesuffix(".weight") for found in step.sources]
        if f"{path}.scales" not in out:
            (name,) = (found.name for found in step.sources)
            assert np.array_equal(np.array(out[target.name].astype(mx.float32)), held[name].float().numpy())
            continue
        mode = "mxfp4" if ".switch_mlp." in path else "mxfp8"
        bits = {"mxfp4": 4, "mxfp8": 8}[mode]
        codes = np.concatenate([octets(held[f"{module}.weight"]) for module in modules])
        assert np.array_equal(octets(out[f"{path}.weight"]), codes)
        decode = decoded_fp4 if mode == "mxfp4" else decoded_fp8
        wanted = np.stack([decode(parts_of(held, module, "weight", "scale")) for module in modules])
        found = mx.dequantize(
            out[f"{path}.weight"],
            out[f"{path}.scales"],
            group_size=32,
            bits=bits,
            mode=mode,
            dtype=mx.float32,
        )
        assert np.array_equal(np.array(found).reshape(wanted.shape), wanted), path
        experts, blocks = experts + (mode == "mxfp4"), blocks + (mode == "mxfp8")
    assert (experts, blocks) == (3 * 6, 8 * 6 + 2)


def test_what_is_not_packed_keeps_its_dtype(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("official", "plain")
    held = stored(source)
    for flags in ([], ["-q", "--q-group-size", "32"], ["--dtype", "float16"]):
        out = tmp_path / "-".join(["out", *flags])
        convert(source, out, *flags)
        arrays = loaded(out)
        kept = ("norm.weight", "_hc.fn", "_hc.base", "_hc.scale", "hc_head.fn", "attn_sink", ".ape")
        kept += ("e_score_correction_bias", "compressor.wkv.weight", "compressor.wgate.weight")
        names = [name for name in arrays if name.endswith((*kept, "weights_proj.weight"))]
        assert len(names) == 1 + 1 + 6 * (4 + 6 + 1) + 3 + 4 * 4 + 2 * 5
        dtypes = {torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}
        by_name = {target.name: step.sources[0].name for step, target in stored_and_made(source)}
        for name in names:
            assert arrays[name].dtype == dtypes[held[by_name[name]].dtype], (name, flags)


def stored_and_made(source: Path) -> list[tuple[Any, Any]]:
    plan = make_plan(open_checkpoint(source), Options())
    return [(step, target) for step in plan.steps for target in step.targets]


def test_rows_that_are_split_or_joined_keep_their_bits(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("dialect-a", "plain")
    convert(source, tmp_path / "a")
    held, out = stored(source), loaded(tmp_path / "a")
    for layer in range(6):
        for part in ("weight", "scales", "biases"):
            ours = out[f"model.layers.{layer}.attn.wo_a.{part}"]
            assert ours.ndim == 3
            for g in range(2):
                assert np.array_equal(octets(ours[g]), octets(held[f"layers.{layer}.attn.wo_a.{g}.{part}"]))
    # Packed rows of a fused projection, as a conversion with exo's names would quantize them.
    fused = {}
    dense, _ = sources("dialect-c", "plain")
    for name, tensor in stored(dense).items():
        if name.endswith(("wqkv_a.weight", "wkv_gate.weight")):
            packed = mx.quantize(mx.array(tensor.numpy()), group_size=32, bits=8)
            for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
                fused[f"{name.removesuffix('.weight')}.{part}"] = torch.from_numpy(np.array(array))
        else:
            fused[name] = tensor
    folder = rewritten(dense, tmp_path / "packed", fused)
    convert(folder, tmp_path / "c")
    out = loaded(tmp_path / "c")
    for layer in range(6):
        for part in ("weight", "scales", "biases"):
            both = [out[f"model.layers.{layer}.attn.{name}.{part}"] for name in ("wq_a", "wkv")]
            joined = np.concatenate([octets(array) for array in both])
            assert np.array_equal(joined, octets(fused[f"layers.{layer}.attn.wqkv_a.{part}"]))
    name = "model.layers.2.attn.indexer.compressor"
    joined = np.concatenate([octets(out[f"{name}.{half}.scales"]) for half in ("wkv", "wgate")])
    assert np.array_equal(joined, octets(fused["layers.2.attn.indexer.compressor.wkv_gate.scales"]))


def test_the_table_runs_backwards_to_deepseeks_names(sources: Sources) -> None:
    official, _ = sources("official-f32", "plain")
    ours, _ = sources("dialect-b", "plain")
    config = json.loads((ours / "config.json").read_text())
    arrays = mx.load(str(ours / "model.safetensors"))
    back: dict[str, mx.array] = {}
    for rule in (route for route in table_of(config)[1].aimed("hub").routes if route.first):
        for key in rule.applications():
            made = rule.op.apply([arrays.pop(name) for name in rule.sources(key)])
            back |= zip(rule.targets(key), made, strict=True)
    assert arrays == {}
    wanted = mx.load(str(official / "model.safetensors"))
    assert back.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(back[name], array).item(), name


# ---- what is missing or renamed


def rewritten(source: Path, folder: Path, tensors: Stored) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize("gap", GAPS)
def test_the_gaps_of_mlx_lm_arrive_and_are_missed(
    gap: str, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = sources("dialect-a", "plain")
    held = stored(source)
    plan = make_plan(open_checkpoint(source), Options())
    # It arrives, as the plan has it, under the name of its module.
    (target,) = (
        target
        for step in plan.steps
        for target in step.targets
        if any(GAPS[gap] in found.parts.values() for found in step.sources)
    )
    assert target.exactness == "copied"
    assert set(target.parts) == {"weight", "scales", "biases"}
    without = {name: tensor for name, tensor in held.items() if name != GAPS[gap]}
    for number, tensors in enumerate((without, {**without, f"{GAPS[gap]}_old": held[GAPS[gap]]})):
        folder = rewritten(source, tmp_path / f"broken-{number}", tensors)
        out = tmp_path / f"out-{number}"
        assert main(["convert", str(folder), "--mlx-path", str(out)]) == 1
        assert not out.exists()
        said = capsys.readouterr().err
        module = GAPS[gap].rpartition(".")[0]
        assert module in said or "wo_a" in said


# The last tensor of each kind: those of other layers and experts are matched by the same rules.
EACH = [pytest.param(False, id="one of a kind"), pytest.param(True, id="each", marks=ONLY_IN_ALL)]


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("layout", ["official", "dialect-a", "dialect-c", "transformers"])
def test_no_tensor_can_be_left_out_or_renamed(layout: str, each: bool, sources: Sources) -> None:
    source, _ = sources(layout, "plain")
    found = open_checkpoint(source)
    specs = {name: entry.spec for name, entry in found.tensors.items()}
    assert make_steps(specs, found.config, Options()).problems == ()
    kinds = {re.sub(r"\d+", "#", name): name for name in specs}
    assert len(kinds) > 30
    for name in specs if each else kinds.values():
        rest = {other: spec for other, spec in specs.items() if other != name}
        assert make_steps(rest, found.config, Options()).problems, name
        renamed = {**rest, name.replace("w", "v", 1) + "x": specs[name]}
        assert make_steps(renamed, found.config, Options()).problems, name


def test_two_layouts_in_one_are_refused(sources: Sources) -> None:
    found = open_checkpoint(sources("dialect-b", "plain")[0])
    other = open_checkpoint(sources("official-f32", "plain")[0])
    specs = {name: entry.spec for name, entry in found.tensors.items()}
    specs["layers.2.attn.wkv.weight"] = other.tensors["layers.2.attn.wkv.weight"].spec
    (problem,) = make_steps(specs, found.config, Options()).problems
    assert problem.what == "duplicate"
    assert problem.subject == "model.layers.2.attn.wkv"


@pytest.mark.parametrize("value", [8, -1, 2**32 + 3])
def test_an_expert_that_does_not_exist_ends_the_conversion(
    value: int, sources: Sources, tmp_path: Path
) -> None:
    source, _ = sources("official", "plain")
    tensors = stored(source)
    tensors["layers.1.ffn.gate.tid2eid"][7, 1] = value
    plan = make_plan(open_checkpoint(rewritten(source, tmp_path / "broken", tensors)), Options())
    with pytest.raises(MlaToolsError, match=rf"layers.1.ffn.gate.tid2eid: holds {value}, .* from 0 to 7"):
        execute(plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---- what is said


def planned(source: Path, **keys: Any) -> Plan:
    found = open_checkpoint(source)
    found.config.update(keys)
    return make_plan(found, Options())


def test_the_output_brings_the_class_along(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("official", "plain")
    plan = convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_file"] == "deepseek_v4.py"
    text = (tmp_path / "out" / "deepseek_v4.py").read_text()
    assert text == plan.added["deepseek_v4.py"]
    assert text == bundled("deepseek_v4")
    section = config["quantization"]
    assert (section["mode"], section["bits"]) == ("mxfp8", 8)
    assert section["model.layers.3.ffn.switch_mlp.up_proj"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
    }


def test_a_file_of_the_checkpoint_is_replaced_and_never_run(sources: Sources, tmp_path: Path) -> None:
    source, _ = sources("dialect-b", "plain")
    folder = rewritten(source, tmp_path / "source", stored(source))
    (folder / "deepseek_v4.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "deepseek_v4.py"}))
    assert main(["convert", str(folder), "--mlx-path", str(tmp_path / "out")]) == 0
    assert "mla_tools.models" in (tmp_path / "out" / "deepseek_v4.py").read_text()
    assert not (tmp_path / "ran").exists()


def test_a_plan_says_where_config_and_tensors_disagree(sources: Sources) -> None:
    source, _ = sources("official", "plain")
    notes = planned(source, compress_ratios=[0, 0, 4, 128, 4, 128, 0, 0, 0]).notes
    ratios, own, narrowed = notes
    assert "deepseek_v4.py, and mlx-lm runs that only with --trust-remote-code" in own
    assert ratios.startswith("compress_ratios in config.json has 9 numbers for 6 layers; the last 3 belong")
    assert "I64 and written as I32" in narrowed
    assert "3 x model.layers.{0..2}.ffn.gate.tid2eid" in narrowed


def test_transformers_words_become_the_hubs(sources: Sources) -> None:
    hub = planned(sources("official-f32", "yarn")[0]).config
    theirs = planned(sources("save_pretrained", "yarn")[0]).config
    for key in ("compress_ratios", "num_hash_layers", "rope_theta", "compress_rope_theta"):
        assert theirs[key] == (hub[key][:6] if key == "compress_ratios" else hub[key]), key
    wanted = hub["rope_scaling"]
    assert {key: theirs["rope_scaling"][key] for key in wanted} == wanted
    assert planned(sources("save_pretrained", "plain")[0]).config["rope_scaling"] is None


REFUSED = {
    "ratio": ({"compress_ratios": [0, 0, 4, 128, 8, 128]}, "compress_ratios cannot be used"),
    "a ratio that is none": (
        {"compress_ratios": [[0], 0.0, 4, 128, 4, 128]},
        "compress_ratios cannot be used",
    ),
    "a kind that is none": ({"compress_ratios": None, "layer_types": [[]] * 6}, "compress_ratios cannot"),
    "a part that is none": (
        {"qk_rope_head_dim": None, "partial_rotary_factor": float("nan")},
        "qk_rope_head_dim cannot be used",
    ),
    "few ratios": ({"compress_ratios": [0, 0, 4]}, "compress_ratios cannot be used"),
    "no ratios": ({"compress_ratios": None}, "compress_ratios cannot be used"),
    "kind of layer": (
        {"compress_ratios": None, "layer_types": ["full_attention"] * 6},
        "compress_ratios cannot be used",
    ),
    "scores": ({"scoring_func": "sigmoid"}, "scores other than sqrtsoftplus"),
    "rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope other than yarn"),
    "mscale": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.2}},
        "yarn that scales the attention",
    ),
    "tied": ({"tie_word_embeddings": True}, "a tied output head"),
    "hash": (
        {"num_hash_layers": None, "mlp_layer_types": ["moe", "hash_moe", "hash_moe", "moe", "moe", "moe"]},
        "layers that hash tokens after others",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_class_does_not_compute_is_refused(case: str, sources: Sources) -> None:
    keys, said = REFUSED[case]
    with pytest.raises(MlaToolsError, match=said):
        planned(sources("official-f32", "plain")[0], **keys)
