"""NVFP4 with a global scale: experts move to MLX bit for bit, the other layers are decoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from conversion import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from pairs import pairs, product
from support import loaded
from support import sample as dense_sample

import mla_tools
from mla_tools import plan
from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.codecs import Module, bundle
from mla_tools.codecs.mlx_quantized import MlxQuantized
from mla_tools.errors import CheckpointError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.plan import Source, Step, Workload
from mla_tools.quantization import QuantSpec
from mla_tools.samples import sample_config, write_checkpoint, write_sample
from mla_tools.spec import DType, Spec

Arrays = dict[str, mx.array]

FORMATS = ("modelopt-nvfp4", "ct-nvfp4")
MOES = [
    name
    for name in MODEL_TYPES
    if any(param.global_scale for _, param in table_of(sample_config(name))[1].targets().values())
]
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def one_by_one(stored: Arrays) -> Arrays:
    """Return tensors in float32, with fused experts as tools that quantize store them."""
    tensors: Arrays = {}
    for name, array in stored.items():
        module, _, leaf = name.rpartition(".")
        wide = array if mx.issubdtype(array.dtype, mx.integer) else array.astype(mx.float32)
        if not module.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj"):
            tensors[name] = wide
            continue
        halves = mx.split(wide, 2, axis=1) if leaf == "gate_up_proj" else [wide]
        words = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for word, half in zip(words, halves, strict=True):
            tensors |= {f"{module}.{e}.{word}.weight": expert for e, expert in enumerate(half)}
    return tensors


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, fmt: str) -> Path:
        if (family, fmt) not in made:
            place = tmp_path_factory.mktemp("samples")
            dense = dense_sample(family)
            tensors = one_by_one(loaded(dense))
            config = json.loads((dense / "config.json").read_text())
            made[family, fmt] = place / family
            write_checkpoint(place / family, config, tensors, fmt)
        return made[family, fmt]

    return folder


Sample = Callable[[str, str], Path]


def stacks(made: plan.Plan) -> Iterator[tuple[Step, str]]:
    """Yield the steps whose target has global scales, with the path of its module."""
    for step in made.steps:
        if any("global_scale" in target.parts for target in step.targets):
            (target,) = step.targets
            yield step, target.name.removesuffix(".weight")


def part(source: Source, stored: Arrays, *names: str) -> mx.array:
    return next(stored[source.parts[name]] for name in names if name in source.parts)


def numbers(source: Source, stored: Arrays) -> np.ndarray:
    """Return what a stored tensor stands for in float64, by ml_dtypes and the definition of the format."""
    packed = np.array(part(source, stored, "weight", "_packed"))
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    scales = np.array(part(source, stored, "_scale")).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * np.repeat(scales, 16, axis=1)
    second = part(source, stored, "_scale_2", "_global_scale").item()
    return values / second if "_global_scale" in source.parts else values * second


def decoded(out: Arrays, path: str) -> np.ndarray:
    """Return what MLX takes the experts of a module for, in float32."""
    parts = (out[f"{path}.{name}"] for name in ("weight", "scales", "global_scale"))
    experts = [
        mx.dequantize(w, s, global_scale=g, dtype=mx.float32, **NVFP4) for w, s, g in zip(*parts, strict=True)
    ]
    return np.array(mx.stack(experts))


@pytest.mark.parametrize(("family", "fmt"), product(MOES, FORMATS, pairs(MOES, FORMATS, times=1)))
def test_experts_keep_their_bits_and_mlx_lm_loads_them(
    family: str, fmt: str, sample: Sample, tmp_path: Path
) -> None:
    source = sample(family, fmt)
    made = convert(source, tmp_path / "out")
    stored, out = loaded(source), loaded(tmp_path / "out")
    found = list(stacks(made))
    assert len(found) == sum(name.endswith(".global_scale") for name in out) >= 3
    for step, path in found:
        codes = mx.stack([part(s, stored, "weight", "_packed") for s in step.sources])
        assert np.array_equal(np.array(out[f"{path}.weight"].view(mx.uint8)), np.array(codes))
        scales = mx.stack([part(s, stored, "_scale") for s in step.sources])
        assert mx.array_equal(out[f"{path}.scales"], scales).item()
        wanted = np.stack([numbers(s, stored) for s in step.sources]).astype(np.float32)
        # The product with 2688 is rounded, the quotient again and then the product with the codes: three
        # halves of a unit, where one rounding would be a half.
        np.testing.assert_array_max_ulp(decoded(out, path), wanted, maxulp=2)
        assert made.config["quantization"][path] == {**NVFP4, "global_scale": True}
        assert step.targets[0].exactness == "repacked"
    outside = [name for name, a in out.items() if a.dtype == mx.uint32 and ".switch_mlp." not in name]
    assert outside == []
    model, _ = load_model(tmp_path / "out", strict=True, trust_remote_code=True)
    assert sum("global_scale" in module for _, module in model.named_modules()) == len(found)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_plan_says_what_is_kept_what_is_decoded_and_why(fmt: str, sample: Sample, tmp_path: Path) -> None:
    made = convert(sample("deepseek_v3", fmt), tmp_path / "out")
    kept, lost = (note for note in made.notes if "global scale" in note)
    held = len(list(stacks(made)))
    words = [t.exactness for step in made.steps for t in step.targets]
    assert kept.startswith(f"nvfp4 with a global scale: {held} tensors of experts keep")
    assert "only on a GPU" in kept
    assert lost.startswith(f"nvfp4 with a global scale: {words.count('decoded')} tensors decoded to floats")
    assert words.count("repacked") == held


def test_experts_that_are_wanted_in_floats_are_not_said_to_have_no_place(
    sample: Sample, tmp_path: Path
) -> None:
    flags = ("--q-override", "switch_mlp|lm_head=float")
    made = convert(sample("deepseek_v3", "ct-nvfp4"), tmp_path / "out", *flags)
    assert list(stacks(made)) == []
    outside = sum(
        t.exactness == "decoded" and ".switch_mlp." not in t.name for step in made.steps for t in step.targets
    )
    (note,) = (note for note in made.notes if "global scale" in note)
    assert f": {outside} tensors decoded" in note


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_slabs_that_end_within_an_expert_write_its_scale_once(
    rows: int, sample: Sample, tmp_path: Path
) -> None:
    source = sample("deepseek_v3", "modelopt-nvfp4")
    made = convert(source, tmp_path / "whole")
    execute(made, tmp_path / "cut", workload=Workload(2, rows * 256, 10**9))
    files = [*(tmp_path / "whole").glob("*.safetensors")]
    assert files
    for file in files:
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()


# Experts have 128 rows of 256 numbers or 256 rows of 128. Slabs of these multiples of that begin and end
# within experts: in rows of 128 numbers they are 640 rows, which are two experts and a half, or 384, or 100.
EXPERT = 128 * 256


@pytest.fixture(scope="module")
def stacked(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("stacked") / "source"
    convert(sample("deepseek_v3", "modelopt-nvfp4"), source)
    return source


@pytest.fixture(
    scope="module",
    params=[[], ["-d", "--dtype", "float32"], ["-q", "--q-mode", "nvfp4"]],
    ids="".join,
)
def expert_by_expert(
    request: pytest.FixtureRequest, stacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[plan.Plan, dict[str, bytes]]:
    """Return a plan, and the files that it makes in slabs of one expert and at once."""
    folder = tmp_path_factory.mktemp("expert")
    made = convert(stacked, folder / "whole", *request.param)
    execute(made, folder / "one", workload=Workload(1, EXPERT, 10**9))
    one = {file.name: file.read_bytes() for file in (folder / "one").glob("*.safetensors")}
    assert one
    for name, data in one.items():
        assert (folder / "whole" / name).read_bytes() == data
    if not request.param:
        # Most experts have a scale of their own, so one in another's place is seen.
        scales = [array for name, array in loaded(folder / "one").items() if name.endswith("global_scale")]
        assert scales
        assert all(len(set(array.tolist())) > 4 for array in scales)
    return made, one


@pytest.mark.parametrize("experts", [2.5, 1.5, 100 / 256, 8, 0.01])
def test_slabs_of_a_stack_with_global_scales_may_lie_across_experts(
    experts: float, expert_by_expert: tuple[plan.Plan, dict[str, bytes]], tmp_path: Path
) -> None:
    made, one = expert_by_expert
    if experts == 2.5:
        assert straddling(made, int(experts * EXPERT)) == {(0, 2), (2, 4), (5, 7), (7, 7)}
    execute(made, tmp_path / "cut", workload=Workload(1, int(experts * EXPERT), 10**9))
    for name, data in one.items():
        assert (tmp_path / "cut" / name).read_bytes() == data


def straddling(made: plan.Plan, elements: int) -> set[tuple[int, int]]:
    """Return the first and the last expert of each slab of the stacks with the longer experts."""
    steps = [step for step in made.steps if step.sources[0].name.endswith("switch_mlp.down_proj.weight")]
    slabs = [slab for step in steps for slab in step.op.slabs([s.spec for s in step.sources], elements)]
    return {(block.start // 256, (block.stop - 1) // 256) for slab in slabs for block in slab.reads}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", ["deepseek_v3", "mistral4"])
def test_sanitize_gives_the_arrays_that_convert_writes(
    family: str, fmt: str, sample: Sample, tmp_path: Path
) -> None:
    source = sample(family, fmt)
    config = json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "out", "--embed-q", "float", "--dtype", "bfloat16")
    # mx.load gives E4M3 scales as bytes, by which they cannot be distinguished from E8M0: the dtype is lost.
    made = mla_tools.sanitize(loaded(source), config, embed_q="float")
    wanted = loaded(tmp_path / "out")
    assert made.keys() == wanted.keys()
    for name, array in wanted.items():
        assert mx.array_equal(made[name].view(mx.uint8), array.view(mx.uint8)).item(), name


def test_what_was_converted_is_copied_and_can_be_decoded_and_quantized(
    sample: Sample, tmp_path: Path
) -> None:
    convert(sample("deepseek_v3", "modelopt-nvfp4"), tmp_path / "once")
    again = convert(tmp_path / "once", tmp_path / "again")
    assert {t.exactness for step in again.steps for t in step.targets} == {"copied"}
    assert any("already" in note for note in again.notes)
    once, out = loaded(tmp_path / "once"), loaded(tmp_path / "again")
    assert once.keys() == out.keys()
    assert all(mx.array_equal(once[n].view(mx.uint8), out[n].view(mx.uint8)).item() for n in once)
    assert (
        json.loads((tmp_path / "again/config.json").read_text())["quantization"]
        == again.config["quantization"]
    )
    made = mla_tools.sanitize(once, json.loads((tmp_path / "once/config.json").read_text()))
    assert all(mx.array_equal(once[n].view(mx.uint8), made[n].view(mx.uint8)).item() for n in once)

    convert(tmp_path / "once", tmp_path / "floats", "-d", "--dtype", "float32")
    floats = loaded(tmp_path / "floats")
    paths = [name.removesuffix(".global_scale") for name in once if name.endswith(".global_scale")]
    for path in paths:
        # MLX divides and multiplies in an order of its own.
        np.testing.assert_array_max_ulp(np.array(floats[f"{path}.weight"]), decoded(once, path), maxulp=2)
    load_model(tmp_path / "floats", strict=True, trust_remote_code=True)

    four = convert(tmp_path / "once", tmp_path / "four", "-q", "--q-bits", "4")
    words = {t.name: t.exactness for step in four.steps for t in step.targets}
    assert {words[f"{path}.weight"] for path in paths} == {"requantized"}
    load_model(tmp_path / "four", strict=True, trust_remote_code=True)

    same = convert(tmp_path / "once", tmp_path / "same", "-q", "--q-mode", "nvfp4")
    words = {t.name: t.exactness for step in same.steps for t in step.targets}
    assert {words[f"{path}.weight"] for path in paths} == {"copied"}
    load_model(tmp_path / "same", strict=True, trust_remote_code=True)


def drop_second(folder: Path, name: str) -> None:
    """Take the global scale of one tensor out of a sample, and put the rest into one file."""
    arrays = {n: place for n, place in open_checkpoint(folder).tensors.items() if n != name}
    header, data, end = {}, [], 0
    for n, place in arrays.items():
        raw = np.fromfile(folder / place.file.name, np.uint8, place.spec.nbytes, offset=place.offset)
        offsets = [end, end + raw.size]
        header[n] = {"dtype": place.spec.dtype.name, "shape": place.spec.shape, "data_offsets": offsets}
        data.append(raw)
        end += raw.size
    for file in folder.glob("model*"):
        file.unlink()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for raw in data:
            raw.tofile(file)


def test_an_index_without_the_scales_loses_nothing(sample: Sample, tmp_path: Path) -> None:
    """ModelOpt's own script leaves the scales out of weight_map."""
    shutil.copytree(sample("deepseek_v3", "modelopt-nvfp4"), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "whole")
    path = tmp_path / "source" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.endswith(scales)}
    path.write_text(json.dumps(index))
    plan = convert(tmp_path / "source", tmp_path / "out")
    assert any("holds tensors that the index does not name; they are used" in note for note in plan.notes)
    for file in sorted((tmp_path / "whole").iterdir()):
        if file.name == "mla_tools.json":  # holds the notes, and this one is among them
            continue
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_expert_without_the_global_scale_that_others_have_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_sample("deepseek_v3", source, "modelopt-nvfp4")
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    drop_second(source, f"{name}_scale_2")
    with pytest.raises(CheckpointError) as refused:
        plan.make_plan(open_checkpoint(source), plan.Options())
    (problem,) = refused.value.problems
    assert (problem.what, problem.needed) == ("its global scale is missing", f"{name}_scale_2")


def test_experts_of_unlike_formats_are_decoded_rather_than_quantized_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_sample("deepseek_v3", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    tensors = {name: array.astype(mx.float32) for name, array in loaded(tmp_path / "dense").items()}
    write_checkpoint(source, config, tensors, "modelopt-nvfp4")
    arrays = {name: array for name, array in loaded(source).items() if ".experts.3.up_proj." not in name}
    assert arrays.keys() != loaded(source).keys()
    found = open_checkpoint(source)
    specs = {name: place.spec for name, place in found.tensors.items() if ".experts.3.up_proj." not in name}
    for layer in range(1, 5):
        dense = f"model.layers.{layer}.mlp.experts.3.up_proj.weight"
        if dense in tensors:
            specs[dense] = Spec(tuple(tensors[dense].shape), DType.BF16)
    made = plan.make_steps(specs, found.config, plan.Options())
    assert made.problems == ()
    words = {t.name: t.exactness for step in made.steps for t in step.targets}
    assert words["model.layers.2.mlp.switch_mlp.up_proj.weight"] == "decoded"
    assert words["model.layers.2.mlp.switch_mlp.gate_proj.weight"] == "repacked"


# --- the part itself ---------------------------------------------------------------------------------

SPEC = QuantSpec("nvfp4")


@settings(deadline=None, max_examples=60)
@given(experts=st.integers(1, 4), rows=st.integers(1, 5), seed=st.integers(0, 1 << 30), data=st.data())
def test_any_rows_of_any_experts(experts: int, rows: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    parts = {
        "weight": mx.array(rng.integers(0, 1 << 32, (experts * rows, 4), dtype=np.uint32)),
        "scales": mx.array(rng.integers(0, 127, (experts * rows, 2), dtype=np.uint8)),
        "global_scale": mx.array(rng.random(experts, np.float32) + np.float32(0.01)),
    }
    leaves = {
        "weight": Spec((experts, rows, 4), DType.U32),
        "scales": Spec((experts, rows, 2), DType.U8),
        "global_scale": Spec((experts,), DType.F32),
    }
    (claim,) = bundle(Module(leaves, 32, {})).claims
    codec = claim.codec
    assert codec == MlxQuantized(SPEC, DType.BF16, False, rows)
    assert codec.encoded(claim.spec) == leaves
    assert codec.name == "nvfp4 with global scales"
    start = data.draw(st.integers(0, experts * rows - 1))
    stop = data.draw(st.integers(start + 1, experts * rows))
    assert codec.cut(start, stop) == {
        "weight": (start, stop),
        "scales": (start, stop),
        "global_scale": (0, 1),
    }
    held = {"weight": parts["weight"][start:stop], "scales": parts["scales"][start:stop]}
    held["global_scale"] = parts["global_scale"][None]
    got = np.array(codec.decode(held, start, stop, DType.F32))
    each = [parts["global_scale"][row // rows] for row in range(start, stop)]
    whole = [
        mx.dequantize(w[None], s[None], global_scale=g, dtype=mx.float32, **NVFP4)
        for w, s, g in zip(held["weight"], held["scales"], each, strict=True)
    ]
    np.testing.assert_array_max_ulp(got, np.array(mx.concatenate(whole)), maxulp=2)
    kept = codec.finish(codec.to_native(held, start, stop), start, claim.spec)
    begin = [row // rows for row in range(start, stop) if row % rows == 0]
    scales = kept["global_scale"] if begin else mx.zeros(0)
    assert ("global_scale" in kept) == bool(begin)
    assert np.array_equal(np.array(scales), np.array(parts["global_scale"])[begin])


@pytest.mark.parametrize(
    ("leaves", "sentence"),
    [
        ({"weight": ((2, 3, 4), DType.U32), "scales": ((2, 3, 2), DType.U8)}, r"F32 \[3\]; beside nvfp4"),
        ({"weight": ((2, 3, 4), DType.U32), "scales": ((2, 3, 1), DType.U8)}, "beside mxfp4"),
        ({"weight": ((3, 4), DType.U32), "scales": ((3, 2), DType.U8)}, "for each expert of nvfp4"),
    ],
    ids=["count", "mode", "axes"],
)
def test_a_global_scale_that_does_not_belong_there(leaves: dict, sentence: str) -> None:
    specs = {name: Spec(*spec) for name, spec in leaves.items()}
    with pytest.raises(ValueError, match=sentence):
        bundle(Module({**specs, "global_scale": Spec((3,), DType.F32)}, 32, {}))
