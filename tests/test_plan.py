"""What holds of every plan, tested on samples of every family under many options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import support
from conversion import convert
from listing import checkpoint
from pairs import pairs, product
from safetensors import safe_open

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.cli import options_of, parser
from mla_tools.codecs import Codec, MlxQuantized
from mla_tools.errors import CheckpointError, MlaToolsError, UsageError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.ops import Slab
from mla_tools.options import Options
from mla_tools.plan import Plan, Step, Workload, make_plan, make_steps
from mla_tools.plan import files as plan_files
from mla_tools.quantization import QuantSpec
from mla_tools.report import plan_json
from mla_tools.samples import write_sample
from mla_tools.spec import DType, Spec
from mla_tools.transform import transform

FLAGS: dict[str, list[str]] = {
    "default": [],
    "affine": ["-q"],
    "mxfp4": ["-q", "--q-mode", "mxfp4"],
    "float32": ["--dtype", "float32"],
    "mixed": ["-q", "--quant-predicate", "mixed_3_6"],
}

SAMPLES = [*MODEL_TYPES, "deepseek_v3-fp8", "kimi_linear-f32"]
CASES = [pytest.param(family, flags, id=f"{family}-{flags}") for family in SAMPLES for flags in FLAGS]
# For what takes long: where tensors lie and how they are cut is decided by their shapes and codecs alone.
FEWER = product(SAMPLES, FLAGS, pairs(SAMPLES, FLAGS))


@cache
def sample(family: str) -> Path:
    """Return a sample of a family: "deepseek_v3" in bf16, "deepseek_v3-fp8" in FP8."""
    name, _, fmt = family.partition("-")
    return support.sample(name, fmt or "bf16")


def options(*flags: str) -> Options:
    return options_of(parser().parse_args(["plan", "somewhere", *flags]))


def planned(folder: Path, *flags: str) -> Plan:
    return make_plan(open_checkpoint(folder), options(*flags))


@cache
def plan_of(family: str, flags: str) -> Plan:
    return planned(sample(family), *FLAGS[flags])


def stored_names(folder: Path) -> list[str]:
    """Return the names in all files of a folder, as the safetensors library reads them."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            names += file.keys()
    assert names, f"{folder} holds no weights"
    return names


def exactness(plan: Plan) -> dict[str, str]:
    return {t.name.removesuffix(".weight"): t.exactness for step in plan.steps for t in step.targets}


def words(plan: Plan) -> dict[str, int]:
    return dict(Counter(exactness(plan).values()))


# --- every tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "flags"), CASES)
def test_every_stored_tensor_is_used_or_dropped_exactly_once(family: str, flags: str) -> None:
    plan = plan_of(family, flags)
    sources = [source for step in plan.steps for source in step.sources]
    sources += [drop.source for drop in plan.drops]
    used = [name for source in sources for name in source.parts.values()]
    assert sorted(used) == sorted(stored_names(sample(family)))


@pytest.mark.parametrize(("family", "flags"), CASES)
def test_every_target_is_made_and_written_exactly_once(family: str, flags: str) -> None:
    plan = plan_of(family, flags)
    targets = [target for step in plan.steps for target in step.targets]
    wanted = table_of(plan.checkpoint.config)[1].targets()
    assert sorted(target.name for target in targets) == sorted(wanted)
    for target in targets:
        assert target.spec.shape == wanted[target.name][0]
    made = [item for target in targets for item in target.stored().items()]
    written = [item for file in plan.files for item in file.tensors.items()]
    assert len(dict(written)) == len(written)
    assert sorted(made, key=str) == sorted(written, key=str)


@pytest.mark.parametrize(("family", "flags"), CASES)
def test_an_op_makes_the_shapes_that_are_planned(family: str, flags: str) -> None:
    for step in plan_of(family, flags).steps:
        specs = step.op.infer([source.spec for source in step.sources])
        assert [spec.shape for spec in specs] == [target.spec.shape for target in step.targets]


# --- the config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "flags"), CASES)
def test_the_config_describes_every_quantized_module_and_no_other(family: str, flags: str) -> None:
    plan = plan_of(family, flags)
    tensors = {name: spec for file in plan.files for name, spec in file.tensors.items()}
    section: dict[str, Any] = plan.config.get("quantization", {})
    assert plan.config.get("quantization_config", {}) == section
    assert bool(section) == ("-q" in FLAGS[flags])
    default = {key: value for key, value in section.items() if not isinstance(value, dict)}
    quantized = set()
    for target in (target for step in plan.steps for target in step.targets):
        path = target.name.removesuffix(".weight")
        if f"{path}.scales" not in tensors:
            assert tensors[target.name] == target.spec
            continue
        quantized.add(path)
        entry = {**default, **section.get(path, {})}
        width = target.spec.shape[-1]
        weight, scales = tensors[target.name], tensors[f"{path}.scales"]
        assert weight.dtype is DType.U32
        assert weight.shape[-1] * 32 == width * entry["bits"]
        assert scales.shape[-1] * entry["group_size"] == width
        assert weight.shape[:-1] == scales.shape[:-1] == target.spec.shape[:-1]
        assert (f"{path}.biases" in tensors) == (entry["mode"] == "affine") == (scales.dtype is not DType.U8)
    assert {path for path, value in section.items() if isinstance(value, dict)} <= quantized
    assert {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")} == quantized


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_config_names_the_class_and_keeps_the_rest(family: str) -> None:
    plan = plan_of(family, "default")
    assert plan.config["model_type"] == MODEL_TYPES[family].model_type
    kept = MODEL_TYPES[family].rewritten(plan.checkpoint.config)
    kept.pop("vision_config", None)
    assert {**plan.config, **kept} == plan.config
    assert "quantization_config: removed" in plan_of("deepseek_v3-fp8", "default").config_changes


def test_a_plan_does_not_change_the_config_of_its_checkpoint() -> None:
    found = open_checkpoint(sample("deepseek_v3-fp8"))
    before = json.dumps(found.config)
    make_plan(found, options("-q"))
    assert json.dumps(found.config) == before


def test_the_default_and_the_exceptions_of_a_router() -> None:
    section = plan_of("kimi_linear", "affine").config["quantization"]
    assert {k: v for k, v in section.items() if not isinstance(v, dict)} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    router = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert section["model.layers.1.mlp.gate"] == router
    section = plan_of("longcat_flash", "mxfp4").config["quantization"]
    assert section["mode"] == "mxfp4"
    assert section["model.layers.0.mlp.router.classifier"] == router


# --- the files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [5 << 30, 400_000, 1])
@pytest.mark.parametrize(("family", "flags"), FEWER)
def test_offsets_tile_each_file_and_files_stay_small(
    family: str, flags: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", limit)
    plan = planned(sample(family), *FLAGS[flags])
    targets = {name: t.name for step in plan.steps for t in step.targets for name in t.stored()}
    homes: dict[str, set[str]] = {}
    for file in plan.files:
        length = int.from_bytes(file.layout.header[:8], "little")
        header = json.loads(file.layout.header[8:])
        assert len(file.layout.header) == 8 + length
        assert header.pop("__metadata__") == {"format": "mlx"}
        reached = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            spec = Spec(tuple(entry["shape"]), DType[entry["dtype"]])
            assert spec == file.tensors[name]
            assert begin == reached
            assert end - begin == spec.nbytes == file.layout.nbytes[name]
            assert file.layout.offsets[name] == 8 + length + begin
            assert file.layout.offsets[name] % spec.dtype.nbytes == 0
            reached = end
        assert file.layout.size == 8 + length + reached
        assert header.keys() == file.tensors.keys()
        held = {targets[name] for name in header}
        assert reached <= limit or len(held) == 1
        for target in held:
            homes.setdefault(target, set()).add(file.name)
    # The parts of a tensor lie together.
    assert all(len(files) == 1 for files in homes.values())
    count = len(plan.files)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert [file.name for file in plan.files] == (names if count > 1 else ["model.safetensors"])
    assert count > 1 or limit > 400_000
    if limit == 1:
        assert count == len(homes)


def test_the_same_checkpoint_gives_the_same_plan() -> None:
    first, second = (planned(sample("deepseek_v3-fp8"), "-q") for _ in range(2))
    assert first == second


def test_layer_10_comes_after_layer_9() -> None:
    names = [step.targets[0].name for step in make_plan(checkpoint("glm4_moe_lite"), Options()).steps]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


# --- memory ------------------------------------------------------------------------------------------


ENOUGH = 1 << 40


def slabs(step: Step, work: Workload) -> list[Slab]:
    return list(step.op.slabs([source.spec for source in step.sources], work.slab_elements))


def base_of(plan: Plan) -> int:
    """Return the bytes that a plan takes without any slab."""
    return replace(plan, steps=()).workload(ENOUGH).peak_bytes


def in_and_out(step: Step, slab: Slab) -> int:
    """Return what a slab must hold at the very least: the bytes read and, unless they are the same, those
    written."""
    total = 0
    for read in slab.reads:
        source = step.sources[read.index]
        total += rows_bytes(source.codec, source.spec, read.start, read.stop)
    for write in slab.writes:
        target = step.targets[write.index]
        total += rows_bytes(target.codec, target.spec, write.start, write.stop)
    return total


def rows_bytes(codec: Codec, spec: Spec, start: int, stop: int) -> int:
    encoded = codec.encoded(spec)
    return sum(
        (last - first) * encoded[part].row_bytes for part, (first, last) in codec.cut(start, stop).items()
    )


@pytest.mark.parametrize(("family", "flags"), CASES)
def test_no_slab_holds_more_than_the_peak(family: str, flags: str) -> None:
    plan = plan_of(family, flags)
    work = plan.workload(ENOUGH, threads=1)
    slab_bytes = work.peak_bytes - work.cache_bytes - base_of(plan)
    assert all(in_and_out(step, slab) <= slab_bytes for step in plan.steps for slab in slabs(step, work))
    for threads in (1, 2, 3, 8):
        held = threads * slab_bytes
        more = plan.workload(ENOUGH, threads)
        # A quarter of what is held may be kept after it is freed.
        assert more == Workload(threads, work.slab_elements, base_of(plan) + held + held // 4, held // 4)


@pytest.mark.parametrize(("family", "flags"), FEWER)
def test_a_budget_is_kept_until_nothing_smaller_works(family: str, flags: str) -> None:
    plan = plan_of(family, flags)
    most = plan.workload(ENOUGH, threads=4)
    budget, seen = most.peak_bytes, [most]
    while True:
        try:
            work = plan.workload(budget, threads=4)
        except MlaToolsError as error:
            least = int(re.search(r"at least --max-memory (\d+)MB", str(error))[1]) * 10**6
            break
        assert work.peak_bytes <= budget
        seen.append(work)
        budget = work.peak_bytes - 1
    # What the refusal names is enough, and a megabyte less is not.
    assert seen[-1].peak_bytes <= plan.workload(least, threads=4).peak_bytes <= least
    with pytest.raises(MlaToolsError, match="at least"):
        plan.workload(least - 10**6, threads=4)
    # Neither more threads nor larger slabs come with less memory.
    assert [work.threads for work in seen] == sorted((work.threads for work in seen), reverse=True)
    assert seen[-1].threads == 1


@pytest.mark.parametrize("quantize", [None, QuantSpec()], ids=["default", "affine"])
@pytest.mark.parametrize("name", ["deepseek_v32", "kimi_linear", "longcat_flash"])
def test_the_peak_of_a_large_model_is_that_of_a_slab(name: str, quantize: QuantSpec | None) -> None:
    plan = make_plan(checkpoint(name), Options(quantize=quantize))
    work = plan.workload(ENOUGH, threads=1)
    peak = work.peak_bytes - work.cache_bytes - base_of(plan)
    # A hundredth of the smallest of these models, and less than a layer of it.
    assert work.slab_elements < peak < 200_000_000
    largest: dict[str, Step] = {}
    for step in plan.steps:
        largest.setdefault(f"{step.op} {step.sources[0].spec} {step.targets[0].codec}", step)
    assert all(in_and_out(step, slab) <= peak for step in largest.values() for slab in slabs(step, work))


def measured(step: Step, work: Workload) -> int:
    """Return the bytes that the slabs of a step take at most, what is read among them, as MLX says."""
    worst = 0
    for slab in slabs(step, work):
        parts = []
        for read in slab.reads:
            source = step.sources[read.index]
            encoded = source.codec.encoded(source.spec)
            parts.append(
                {
                    part: mx.ones((last - first, encoded[part].width), getattr(mx, encoded[part].dtype.mlx))
                    for part, (first, last) in source.codec.cut(read.start, read.stop).items()
                }
            )
        mx.eval(parts)
        read_bytes = sum(array.nbytes for held in parts for array in held.values())
        before = mx.get_active_memory() - read_bytes
        mx.reset_peak_memory()
        results = transform(step, slab, parts)
        mx.eval(results)
        worst = max(worst, mx.get_peak_memory() - before)
    return worst


@pytest.mark.parametrize("fmt", ["bf16", "f32", "fp8"])
@pytest.mark.parametrize("flags", ["default", "affine", "mxfp8", "mxfp4", "nvfp4"])
def test_mlx_takes_no_more_than_the_peak(fmt: str, flags: str) -> None:
    mode = [] if flags == "default" else ["-q", "--q-mode", flags]
    plan = planned(sample(f"deepseek_v3-{fmt}"), *mode)
    for step in plan.steps:
        # Of small tensors, MLX's own bookkeeping is the larger part.
        if sum(source.spec.size for source in step.sources) >= 1 << 15:
            work = replace(plan, steps=(step,)).workload(ENOUGH, threads=1)
            assert measured(step, work) <= work.peak_bytes - base_of(plan), step.targets[0].name


# --- exactness ---------------------------------------------------------------------------------------

# id -> (sample, flags, word of what is cast, word of what is not)
DENSE = {
    "bf16": ("deepseek_v3", [], "copied", "copied"),
    "bf16 to f32": ("deepseek_v3", ["--dtype", "float32"], "repacked", "copied"),
    "bf16 to f16": ("deepseek_v3", ["--dtype", "float16"], "rounded", "copied"),
    "f32": ("deepseek_v3-f32", [], "copied", "copied"),
    "f32 to bf16": ("deepseek_v3-f32", ["--dtype", "bfloat16"], "rounded", "copied"),
    "f16": ("deepseek_v3-f16", [], "copied", "copied"),
    "f16 to bf16": ("deepseek_v3-f16", ["--dtype", "bfloat16"], "rounded", "copied"),
    "f16 to f32": ("deepseek_v3-f16", ["--dtype", "float32"], "repacked", "copied"),
}


@pytest.mark.parametrize(("family", "flags", "cast", "kept"), DENSE.values(), ids=DENSE.keys())
def test_words_of_dense_to_dense(family: str, flags: list[str], cast: str, kept: str) -> None:
    found = exactness(planned(sample(family), *flags))
    biases = {word for name, word in found.items() if name.endswith("e_score_correction_bias")}
    others = {word for name, word in found.items() if not name.endswith("e_score_correction_bias")}
    assert biases == {kept}
    assert others == {cast}


def test_words_of_dense_to_quantized() -> None:
    plan = planned(sample("deepseek_v3"), "-q")
    found = exactness(plan)
    quantized = {path for path in found if path in quantized_paths(plan)}
    assert {found[path] for path in quantized} == {"encoded"}
    assert {word for path, word in found.items() if path not in quantized} == {"copied"}


def quantized_paths(plan: Plan) -> set[str]:
    """Return the modules that are written quantized."""
    return {
        target.name.removesuffix(".weight")
        for step in plan.steps
        for target in step.targets
        if isinstance(target.codec, MlxQuantized)
    }


@pytest.mark.parametrize(
    ("flags", "word"),
    [([], "decoded"), (["-d"], "decoded"), (["--dtype", "float32"], "decoded"), (["-q"], "requantized")],
    ids=["default", "dequantize", "float32", "affine"],
)
def test_words_of_fp8(flags: list[str], word: str) -> None:
    found = exactness(planned(sample("deepseek_v3-fp8"), *flags))
    for path in ("self_attn.embed_q", "self_attn.unembed_out", "self_attn.o_proj", "mlp.switch_mlp.up_proj"):
        assert found[f"model.layers.2.{path}"] == word
    # Dense in the source.
    kept = "encoded" if "-q" in flags else "repacked" if "float32" in flags else "copied"
    assert found["lm_head"] == kept
    assert found["model.layers.2.mlp.gate.e_score_correction_bias"] == "copied"


@cache
def quantized(family: str, *flags: str) -> Path:
    """Return a sample that was converted with -q."""
    folder = Path(mkdtemp()) / family
    convert(sample(family), folder, "-q", *flags)
    return folder


MODES = ["affine", "mxfp4", "mxfp8", "nvfp4"]


@pytest.mark.parametrize(("family", "mode"), product(MODEL_TYPES, MODES, pairs(MODEL_TYPES, MODES, times=1)))
def test_a_quantized_source_is_kept_bit_for_bit(family: str, mode: str) -> None:
    folder = quantized(family, "--q-mode", mode)
    plan = planned(folder)
    assert set(exactness(plan).values()) == {"copied"}
    assert all(target.moved for step in plan.steps for target in step.targets if target.codec.quantized)
    assert plan.drops == ()
    written = {name: spec for file in plan.files for name, spec in file.tensors.items()}
    assert written == {name: stored.spec for name, stored in plan.checkpoint.tensors.items()}
    assert plan.config == plan.checkpoint.config
    assert plan.config_changes == ()


def test_asking_for_what_is_there_changes_nothing() -> None:
    assert words(planned(quantized("deepseek_v3"), "-q")).keys() == {"copied"}


def test_words_of_quantized_to_otherwise_quantized() -> None:
    source = planned(quantized("deepseek_v3"))
    plan = planned(quantized("deepseek_v3"), "-q", "--q-bits", "8")
    assert words(plan).keys() == {"requantized", "copied"}
    found = exactness(plan)
    assert {path for path, word in found.items() if word == "requantized"} == quantized_paths(source)


def test_words_of_quantized_to_dense() -> None:
    source = planned(quantized("deepseek_v3"))
    plan = planned(quantized("deepseek_v3"), "-d")
    assert {path for path, word in exactness(plan).items() if word == "decoded"} == quantized_paths(source)
    assert words(plan).keys() == {"decoded", "copied"}
    assert not quantized_paths(plan)
    assert "quantization" not in plan.config
    assert "quantization_config" not in plan.config


@pytest.mark.parametrize(("dtype", "word"), [("float32", "repacked"), ("float16", "rounded")])
def test_words_of_quantized_with_scales_in_another_dtype(dtype: str, word: str) -> None:
    found = exactness(planned(quantized("deepseek_v3"), "--dtype", dtype))
    assert found.pop("model.layers.1.mlp.gate.e_score_correction_bias") == "copied"
    assert found["model.layers.1.self_attn.o_proj"] == word
    # The block-float modes have no float dtype.
    found = exactness(planned(quantized("deepseek_v3", "--q-mode", "mxfp4"), "--dtype", dtype))
    assert found["model.layers.1.self_attn.o_proj"] == "copied"
    assert found["model.layers.1.input_layernorm"] == word


# --- the two halves of a quantized kv_b_proj ---------------------------------------------------------


@pytest.fixture(scope="module")
def packed_kv_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the hub's names whose kv_b_proj alone is affine, 4 bits in groups of 64."""
    folder = tmp_path_factory.mktemp("packed")
    for path in sample("deepseek_v3").iterdir():
        if not path.name.startswith("model"):
            (folder / path.name).write_bytes(path.read_bytes())
    weights: dict[str, mx.array] = {}
    for path in sample("deepseek_v3").glob("*.safetensors"):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        weights |= loaded
    for name in [name for name in weights if name.endswith("kv_b_proj.weight")]:
        packed, scales, biases = mx.quantize(weights[name])
        module = name.removesuffix(".weight")
        weights |= {name: packed, f"{module}.scales": scales, f"{module}.biases": biases}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# flags -> (word and format of embed_q, word and format of unembed_out)
HALVES = {
    "": ("requantized affine 8-bit g32", "copied affine 4-bit g64"),
    "--embed-q source": ("requantized affine 4-bit g64", "copied affine 4-bit g64"),
    "--embed-q float": ("decoded bf16", "copied affine 4-bit g64"),
    "--embed-q 6": ("requantized affine 6-bit g64", "copied affine 4-bit g64"),
    "--embed-q 8,32,mxfp8": ("requantized mxfp8", "copied affine 4-bit g64"),
    "-q": ("requantized affine 4-bit g64", "copied affine 4-bit g64"),
    "-q --q-bits 8": ("requantized affine 8-bit g64", "requantized affine 8-bit g64"),
    "-d": ("decoded bf16", "decoded bf16"),
}


# What is chosen by name and does not divide the 64 columns of embed_q: flags -> what asks for it.
INDIVISIBLE = {
    "--embed-q 8,128": r"embed_q asks for it \(--embed-q\)",
    "--q-override embed_q=8,128": "The override 'embed_q' asks for it",
    "-q --q-override embed_q=8,128": "The override 'embed_q' asks for it",
}


@pytest.mark.parametrize(("flags", "because"), INDIVISIBLE.items(), ids=INDIVISIBLE)
def test_a_choice_by_name_that_does_not_divide_is_refused_in_every_layer(
    packed_kv_b: Path, flags: str, because: str
) -> None:
    with pytest.raises(CheckpointError, match=because) as refused:
        planned(packed_kv_b, *flags.split())
    found = {problem.subject: problem.what for problem in refused.value.problems}
    assert found == {
        f"model.layers.{layer}.self_attn.embed_q": "cannot be quantized as affine 8-bit g128"
        for layer in range(4)
    }


def test_a_group_of_q_that_does_not_divide_leaves_floats_and_says_so(packed_kv_b: Path) -> None:
    plan = planned(packed_kv_b, "-q", "--q-group-size", "128")
    (note,) = [note for note in plan.notes if note.startswith("unquantized, because the group size 128")]
    assert "its last axis of 64: 4 x model.layers.{0..3}.self_attn.embed_q" in note


@pytest.mark.parametrize(("flags", "wanted"), HALVES.items(), ids=[flags or "default" for flags in HALVES])
def test_v_is_sliced_and_k_is_encoded_as_asked(
    packed_kv_b: Path, flags: str, wanted: tuple[str, str]
) -> None:
    plan = planned(packed_kv_b, *flags.split())
    found = {
        target.name.removesuffix(".weight"): f"{target.exactness} {target.codec.name}"
        for step in plan.steps
        for target in step.targets
    }
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn"
        assert (found[f"{prefix}.embed_q"], found[f"{prefix}.unembed_out"]) == wanted
    section: dict[str, Any] = plan.config.get("quantization", {})
    path = "model.layers.0.self_attn.embed_q"
    if wanted[0] == "requantized affine 8-bit g32":
        assert section[path] == {"group_size": 32, "bits": 8, "mode": "affine"}
    if wanted[0].startswith("decoded"):
        assert path not in section


def test_the_plan_tells_what_embed_q_costs(packed_kv_b: Path) -> None:
    plan = planned(packed_kv_b)
    (cost,) = plan.embed_q_costs
    written = {
        name: spec for file in plan.files for name, spec in file.tensors.items() if ".embed_q." in name
    }
    assert (cost.tensors, cost.nbytes) == (4, sum(spec.nbytes for spec in written.values()))
    assert (cost.before, cost.after) == ("affine 4-bit g64", "affine 8-bit g32")
    assert cost.error is not None
    assert cost.error_as_source is not None
    assert cost.error_as_float is not None
    assert cost.error_as_float < cost.error < cost.error_as_source
    (note,) = [note for note in plan.notes if "K half" in note]
    assert "expected error of K: about 0.0079 of its norm (source: 0.092, float: 0.0045)" in note
    (said,) = plan_json(plan, plan.workload())["embed_q"]
    assert said["error"] == cost.error
    assert planned(packed_kv_b, "-d").embed_q_costs[0].after == "bf16"


# --- options -----------------------------------------------------------------------------------------


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="either quantize or dequantize"):
        Options(quantize=QuantSpec(), dequantize=True)
    with pytest.raises(UsageError, match="not allowed without -q"):
        Options(quant_predicate="mixed_3_6")
    with pytest.raises(UsageError, match="affine"):
        Options(quantize=QuantSpec("mxfp4"), quant_predicate="mixed_3_6")


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_the_dtype_of_the_config_counts_when_none_is_given(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    write_sample(family, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    assert words(planned(folder))["rounded"] > 0
    assert words(planned(folder, "--dtype", "bfloat16")).keys() == {"copied"}


# --- the command -------------------------------------------------------------------------------------

_PRINT_MODULES = """
import sys
from mla_tools.cli import main
code = main(sys.argv[1:])
heavy = {"mlx", "mlx_lm", "torch", "transformers", "rich", "huggingface_hub"}
print(sorted({name.partition(".")[0] for name in sys.modules} & heavy), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "argv", [["inspect"], ["plan"], ["plan", "-q"], ["plan", "--json"]], ids=lambda argv: " ".join(argv)
)
def test_looking_at_a_checkpoint_imports_nothing_heavy(argv: list[str]) -> None:
    command = [sys.executable, "-c", _PRINT_MODULES, argv[0], str(sample("deepseek_v3-fp8")), *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_biases_are_missed(tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "-q")
    found = open_checkpoint(tmp_path / "out")
    specs = {name: entry.spec for name, entry in found.tensors.items()}
    name = "model.layers.2.mlp.switch_mlp.up_proj.biases"
    without = {other: spec for other, spec in specs.items() if other != name}
    (problem,) = make_steps(without, found.config, Options()).problems
    assert (problem.what, problem.needed) == ("its biases are missing", name)
    # Also where no tensor has any: MLX has no such quantization, and nobody else says that they are zero.
    bare = {other: spec for other, spec in specs.items() if not other.endswith(".biases")}
    problems = make_steps(bare, found.config, Options()).problems
    assert {problem.what for problem in problems} == {"its biases are missing"}
    assert len(problems) == len(specs) - len(bare)
    assert make_steps(bare, found.config, Options(missing_biases="zero")).problems == ()


def test_a_choice_for_embed_q_that_changes_nothing_is_a_note(packed_kv_b: Path) -> None:
    def said(*flags: str) -> list[str]:
        return [note for note in planned(packed_kv_b, *flags).notes if "--embed-q has no effect" in note]

    (note,) = said("-q", "--embed-q", "8,32")
    assert "-q decides how embed_q is stored; use --q-override embed_q=..." in note
    (note,) = said("-d", "--embed-q", "8,32")
    assert "no quantized kv_b_proj stays quantized" in note
    assert said("--embed-q", "8,32") == said("-q") == []


def test_an_embedding_that_mlx_decodes_to_bfloat16_is_noted_where_floats_are_float32() -> None:
    def said(*flags: str) -> list[str]:
        notes = planned(sample("deepseek_v3"), "-q", *flags).notes
        return [note for note in notes if note.startswith("MLX decodes an embedding in ")]

    mxfp4 = ("--q-mode", "mxfp4", "--dtype", "float32")
    (note,) = said(*mxfp4)
    assert note.startswith(
        "MLX decodes an embedding in mxfp4 to bfloat16, not to float32: model.embed_tokens;"
    )
    assert said(*mxfp4, "--q-override", "embed=float") == []
    assert said(*mxfp4[:2]) == said("--dtype", "float32") == []
    weights = nn.Embedding(64, 64).to_quantized(mode="mxfp4", group_size=32, bits=4)
    assert weights(mx.array([1])).dtype == mx.bfloat16  # which is why


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"quantize": 4}, "quantize and embed_q are a QuantSpec"),
        ({"embed_q": "8,32"}, 'embed_q as text is "auto", "source" or "float"'),
        ({"dtype": "float16"}, "dtype is a DType"),
        ({"overrides": {"lm_head": QuantSpec()}}, "overrides are a tuple of pairs"),
        ({"overrides": (("lm_head", "6"),)}, "overrides are a tuple of pairs"),
    ],
    ids=["quantize", "embed_q", "dtype", "overrides", "override"],
)
def test_options_of_other_types_are_refused(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Options(**keys)
