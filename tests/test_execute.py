"""From a plan to files: the same bytes however it is cut, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mla_tools import execute as execute_module
from mla_tools import plan as plan_module
from mla_tools.architectures import MODEL_TYPES
from mla_tools.errors import MlaToolsError
from mla_tools.execute import check_output, execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.safetensors import Writer, read_header
from mla_tools.plan import Options, Plan, make_plan
from mla_tools.quantization import QuantSpec
from mla_tools.sample import write_sample

SAMPLES = [("deepseek_v3", "bf16"), ("deepseek_v3", "fp8"), ("kimi_linear", "bf16"), ("kimi_linear", "fp8")]
OPTIONS = {
    "plain": Options(),
    "affine": Options(quantize=QuantSpec()),
    "mxfp4": Options(quantize=QuantSpec("mxfp4")),
}
TINY = {
    "vocab_size": 20,
    "hidden_size": 144,
    "intermediate_size": 136,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 132,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def sample(family: str, fmt: str) -> Path:
        if (family, fmt) not in made:
            made[family, fmt] = tmp_path_factory.mktemp("samples") / f"{family}-{fmt}"
            write_sample(family, made[family, fmt], fmt)
        return made[family, fmt]

    return sample


@pytest.fixture
def plan(samples: Callable[[str, str], Path]) -> Plan:
    return make_plan(open_checkpoint(samples("deepseek_v3", "bf16")), Options())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def use_slabs_of(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(plan_module, "SLAB_ELEMENTS", elements)
    monkeypatch.setattr(execute_module, "SLAB_ELEMENTS", elements)


# --- the same bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("family", "fmt"), SAMPLES)
def test_the_bytes_do_not_depend_on_slabs_or_chance(
    family: str,
    fmt: str,
    options: str,
    samples: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_plan(open_checkpoint(samples(family, fmt)), OPTIONS[options])
    execute(made, tmp_path / "one")
    execute(made, tmp_path / "two")
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    use_slabs_of(monkeypatch, 3000)  # some rows of a matrix, and less than a head of kv_b_proj
    execute(make_plan(open_checkpoint(samples(family, fmt)), OPTIONS[options]), tmp_path / "cut")
    assert contents(tmp_path / "cut") == whole


@pytest.mark.parametrize("elements", [1, 128 * 256])
@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_slabs_of_one_row_and_of_a_block(
    fmt: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model small enough for a read per row.
    family = MODEL_TYPES["deepseek_v3"]
    tiny = replace(family, sample={**family.sample, **TINY})
    monkeypatch.setitem(MODEL_TYPES, "deepseek_v3", tiny)
    write_sample("deepseek_v3", tmp_path / "tiny", fmt)
    execute(make_plan(open_checkpoint(tmp_path / "tiny"), Options()), tmp_path / "whole")
    use_slabs_of(monkeypatch, elements)
    execute(make_plan(open_checkpoint(tmp_path / "tiny"), Options()), tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_memory_told_beforehand_is_that_of_the_slabs(
    samples: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = []
    for elements in (1, 3000, 30_000, 1 << 30):
        use_slabs_of(monkeypatch, elements)
        made = make_plan(open_checkpoint(samples("deepseek_v3", "fp8")), Options())
        peaks.append(made.peak_bytes(2))
        assert made.peak_bytes(2) == 2 * made.peak_bytes(1)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


# --- what is in the folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5 << 30, 1 << 20], ids=["one_file", "several_files"])
def test_the_folder_is_complete_and_says_so(
    shard_bytes: int, samples: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "SHARD_BYTES", shard_bytes)
    source, out = samples("deepseek_v3", "bf16"), tmp_path / "deep" / "out"
    made = make_plan(open_checkpoint(source), Options(quantize=QuantSpec()))
    written: list[int] = []
    execute(made, out, progress=written.append)

    weights = [path.name for path in sorted(out.glob("*.safetensors"))]
    assert (len(weights) == 1) == (shard_bytes > 1 << 20)
    companions = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in sorted(out.iterdir())] == sorted(
        [*weights, *companions, "config.json", INDEX]
    )
    for name in companions:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(json.dumps(made.config))

    index = json.loads((out / INDEX).read_text())
    headers = {name: read_header(out / name) for name in weights}
    places = {tensor: name for name, header in headers.items() for tensor in header.entries}
    assert index["weight_map"] == places
    nbytes = sum(entry.spec.nbytes for header in headers.values() for entry in header.entries.values())
    assert index["metadata"]["total_size"] == nbytes == made.nbytes == sum(written)
    assert index["metadata"]["total_parameters"] == made.parameters
    for name, header in headers.items():
        assert header.metadata == {"format": "mlx"}
        with safe_open(out / name, "np") as file:
            assert set(file.keys()) == header.entries.keys()


def test_total_parameters_counts_numbers_and_not_packed_words(samples: Callable[[str, str], Path]) -> None:
    checkpoint = open_checkpoint(samples("deepseek_v3", "bf16"))
    counts = {options: make_plan(checkpoint, OPTIONS[options]).parameters for options in OPTIONS}
    dropped = sum(drop.source.spec.size for drop in make_plan(checkpoint, Options()).drops)
    stored = sum(entry.spec.size for entry in checkpoint.tensors.values())
    assert counts == dict.fromkeys(OPTIONS, stored - dropped)


def test_every_file_of_the_source_is_left_as_it_was(
    plan: Plan, samples: Callable[[str, str], Path], tmp_path: Path
) -> None:
    before = contents(samples("deepseek_v3", "bf16"))
    execute(plan, tmp_path / "out")
    assert contents(samples("deepseek_v3", "bf16")) == before


# --- failures ----------------------------------------------------------------------------------------


class DisagreementError(Exception):
    pass


def test_a_manifest_that_disagrees_leaves_no_folder(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = []

    def agrees() -> None:
        seen.extend(path.name for path in out.iterdir())
        raise DisagreementError

    with pytest.raises(DisagreementError):
        execute(plan, out, agrees=agrees)
    # Until it agrees, nothing has the name of a model's file.
    assert seen
    assert not [name for name in seen if name.endswith((".safetensors", ".json"))]
    assert not out.exists()


def test_a_source_cut_short_after_planning_is_named_and_leaves_no_folder(
    samples: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(samples("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    shard = source / "model-00002-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(MlaToolsError, match=shard.name):
        execute(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_gone_after_planning_is_named_and_leaves_no_folder(
    samples: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(samples("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    shard = source / "model-00001-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(MlaToolsError, match=shard.name):
        execute(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_companion_gone_after_planning_leaves_no_folder(
    samples: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(samples("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    (source / "tokenizer.json").unlink()
    with pytest.raises(MlaToolsError, match=r"tokenizer\.json"):
        execute(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FAILURES: list[Any] = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), MlaToolsError, id="full_disk"),
    pytest.param(MlaToolsError("nothing more can be written"), MlaToolsError, id="own_error"),
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="interrupted"),
    pytest.param(ZeroDivisionError(), ZeroDivisionError, id="defect"),
]


@pytest.mark.parametrize(("error", "kind"), FAILURES)
@pytest.mark.parametrize("method", ["write", "finish"])
def test_a_failing_writer_leaves_no_folder(
    method: str,
    error: BaseException,
    kind: type[BaseException],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    original = getattr(Writer, method)

    def fail(self: Writer, *args: Any) -> None:
        calls.append(args)
        if method == "finish" or len(calls) == 20:
            raise error
        original(self, *args)

    monkeypatch.setattr(Writer, method, fail)
    with pytest.raises(kind) as caught:
        execute(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert str(tmp_path / "out") in str(caught.value)


def test_an_interruption_between_two_slabs_leaves_no_folder(plan: Plan, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=interrupt)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_the_same_plan_can_be_executed(plan: Plan, tmp_path: Path) -> None:
    def fail() -> None:
        raise DisagreementError

    with pytest.raises(DisagreementError):
        execute(plan, tmp_path / "out", agrees=fail)
    execute(plan, tmp_path / "out")
    execute(plan, tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken_link"])
def test_what_exists_is_refused_and_left_alone(kind: str, plan: Plan, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    if kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(there)
        if kind == "link":
            there.mkdir()
    with pytest.raises(MlaToolsError, match="already exists"):
        check_output(out)
    with pytest.raises(MlaToolsError, match="already exists"):
        execute(plan, out)
    if kind == "folder":
        assert contents(out) == {"mine.txt": b"precious"}
    elif kind == "file":
        assert out.read_text() == "precious"
    else:
        assert out.is_symlink()


def test_a_place_where_no_folder_can_be_made_is_said(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlaToolsError, match="cannot be made"):
        execute(plan, tmp_path / "file" / "out")


def test_values_are_those_of_the_source(samples: Callable[[str, str], Path], tmp_path: Path) -> None:
    # One tensor of each op, read with mlx and laid out with numpy.
    source, out = samples("kimi_linear", "bf16"), tmp_path / "out"
    execute(make_plan(open_checkpoint(source), Options()), out)

    weights = {
        folder: {k: v for path in folder.glob("*.safetensors") for k, v in mx.load(str(path)).items()}
        for folder in (source, out)
    }

    def read(folder: Path, name: str) -> Any:
        return np.array(weights[folder][name].astype(mx.float32))

    layer = "model.layers.3"
    experts = [read(source, f"{layer}.block_sparse_moe.experts.{e}.w3.weight") for e in range(8)]
    assert np.array_equal(read(out, f"{layer}.mlp.switch_mlp.up_proj.weight"), np.stack(experts))
    fused = read(source, f"{layer}.self_attn.kv_b_proj.weight").reshape(4, 128, 128)
    assert np.array_equal(read(out, f"{layer}.self_attn.unembed_out.weight"), fused[:, 64:])
    assert np.array_equal(read(out, f"{layer}.self_attn.embed_q.weight"), fused[:, :64].swapaxes(1, 2))
    convolution = read(source, "model.layers.0.self_attn.k_conv1d.weight")
    assert np.array_equal(
        read(out, "model.layers.0.self_attn.k_conv.conv.weight"), np.moveaxis(convolution, 2, 1)
    )
