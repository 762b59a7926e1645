"""From a plan to files: the same bytes however it is cut, and a folder to resume when it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pairs import pairs, product
from safetensors import safe_open
from support import contents, sample
from tiny import TINY

from mla_tools import execute as executing
from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.reader import Reader
from mla_tools.files.safetensors import read_header
from mla_tools.files.writer import Writer
from mla_tools.options import Options
from mla_tools.output import INDEX, RECORD, check_output
from mla_tools.output import writing as output_writing
from mla_tools.plan import Plan, Workload, make_plan
from mla_tools.plan import files as plan_files
from mla_tools.quantization import QuantSpec
from mla_tools.samples import write_sample

SAMPLES = [("deepseek_v3", "bf16"), ("deepseek_v3", "fp8"), ("kimi_linear", "bf16"), ("kimi_linear", "fp8")]
NAMES = {"-".join(sample): sample for sample in SAMPLES}
OPTIONS = {
    "plain": Options(),
    "affine": Options(quantize=QuantSpec()),
    "mxfp4": Options(quantize=QuantSpec("mxfp4")),
}


@pytest.fixture
def plan() -> Plan:
    return make_plan(open_checkpoint(sample("deepseek_v3", "bf16")), Options())


def slabs_of(elements: int, threads: int = 2) -> Workload:
    return Workload(threads, elements, 10**9)


def go_on(source: Path, out: Path, tmp_path: Path) -> None:
    """Resume an unfinished folder, and compare with one that was never interrupted."""
    assert is_visibly_unfinished(out)
    made = make_plan(open_checkpoint(source), Options())
    with pytest.raises(MlaToolsError, match="is an unfinished output: finish it with --resume"):
        execute(made, out)
    assert execute(made, out, resume=True)
    execute(made, tmp_path / "at_once")
    assert contents(out) == contents(tmp_path / "at_once")


def is_visibly_unfinished(out: Path) -> bool:
    """Return whether a folder has a journal, and nothing that any program takes for a model."""
    names = [path.name for path in out.iterdir()]
    models = [name for name in names if name.endswith((".safetensors", ".json"))]
    return bool([*out.glob("mla_tools.journal-*.jsonl")]) and not models


# --- the same bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "options"), product(NAMES, OPTIONS, pairs(NAMES, OPTIONS, times=1)))
def test_the_bytes_do_not_depend_on_slabs_or_chance(
    source: str,
    options: str,
    tmp_path: Path,
) -> None:
    made = make_plan(open_checkpoint(sample(*NAMES[source])), OPTIONS[options])
    execute(made, tmp_path / "one")
    execute(made, tmp_path / "two")
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    # Some rows of a matrix, and less than a head of kv_b_proj.
    for threads in (1, 5):
        out = tmp_path / f"cut for {threads}"
        execute(made, out, workload=slabs_of(3000, threads))
        assert contents(out) == whole


@pytest.mark.parametrize("elements", [1, 128 * 256])
@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_slabs_of_one_row_and_of_a_block(fmt: str, elements: int, tmp_path: Path) -> None:
    # A model small enough for a read per row.
    write_sample("deepseek_v3", tmp_path / "tiny", fmt, changes=TINY)
    made = make_plan(open_checkpoint(tmp_path / "tiny"), Options())
    execute(made, tmp_path / "whole")
    execute(made, tmp_path / "cut", workload=slabs_of(elements))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_data_is_read_in_the_order_in_which_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    read = Reader.read

    def noted(self: Reader, file: Any, offset: int, nbytes: int, into: Any = None) -> Any:
        reads.append((file.name, offset))
        return read(self, file, offset, nbytes, into)

    monkeypatch.setattr(Reader, "read", noted)
    # Dense tensors, each read by a slab of its own; fused tensors and stacks of experts among them.
    made = make_plan(open_checkpoint(sample("deepseek_v3", "bf16")), Options())
    execute(made, tmp_path / "out", workload=slabs_of(3000, threads=1))
    assert len(reads) > 100
    assert reads == sorted(reads)


# --- what is in the folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5 << 30, 1 << 20], ids=["one_file", "several_files"])
def test_the_folder_is_complete_and_says_so(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", shard_bytes)
    source, out = sample("deepseek_v3", "bf16"), tmp_path / "deep" / "out"
    made = make_plan(open_checkpoint(source), Options(quantize=QuantSpec()))
    written: list[int] = []
    execute(made, out, progress=written.append)

    weights = [path.name for path in sorted(out.glob("*.safetensors"))]
    assert (len(weights) == 1) == (shard_bytes > 1 << 20)
    companions = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in sorted(out.iterdir())] == sorted(
        [*weights, *companions, "config.json", INDEX, RECORD]
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


def test_total_parameters_counts_numbers_and_not_packed_words() -> None:
    checkpoint = open_checkpoint(sample("deepseek_v3", "bf16"))
    counts = {options: make_plan(checkpoint, OPTIONS[options]).parameters for options in OPTIONS}
    dropped = sum(drop.source.spec.size for drop in make_plan(checkpoint, Options()).drops)
    stored = sum(entry.spec.size for entry in checkpoint.tensors.values())
    assert counts == dict.fromkeys(OPTIONS, stored - dropped)


def test_every_file_of_the_source_is_left_as_it_was(plan: Plan, tmp_path: Path) -> None:
    before = contents(sample("deepseek_v3", "bf16"))
    execute(plan, tmp_path / "out")
    assert contents(sample("deepseek_v3", "bf16")) == before


# --- failures ----------------------------------------------------------------------------------------


class DisagreementError(Exception):
    pass


def test_a_manifest_that_disagrees_leaves_no_model(plan: Plan, tmp_path: Path) -> None:
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
    go_on(sample("deepseek_v3", "bf16"), out, tmp_path)


def test_a_source_cut_short_after_planning_is_named_and_when_it_is_back_the_output_is_made(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sample("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    shard = source / "model-00002-of-00002.safetensors"
    whole, times = shard.read_bytes(), shard.stat()
    os.truncate(shard, len(whole) // 2)
    with pytest.raises(MlaToolsError, match=shard.name):
        execute(made, tmp_path / "out")
    shard.write_bytes(whole)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    go_on(source, tmp_path / "out", tmp_path)


def test_a_source_gone_after_planning_is_named_and_when_it_is_back_the_output_is_made(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sample("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    shard = source / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "away")
    with pytest.raises(MlaToolsError, match=shard.name):
        execute(made, tmp_path / "out")
    (tmp_path / "away").rename(shard)
    go_on(source, tmp_path / "out", tmp_path)


def test_a_companion_gone_after_planning_is_named_and_when_it_is_back_the_output_is_made(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sample("deepseek_v3", "bf16"), source)
    made = make_plan(open_checkpoint(source), Options())
    (source / "tokenizer.json").unlink()
    with pytest.raises(MlaToolsError, match=r"tokenizer\.json"):
        execute(made, tmp_path / "out")
    shutil.copy(sample("deepseek_v3", "bf16") / "tokenizer.json", source)
    go_on(source, tmp_path / "out", tmp_path)


FAILURES: list[Any] = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), MlaToolsError, id="full_disk"),
    pytest.param(MlaToolsError("nothing more can be written"), MlaToolsError, id="own_error"),
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="interrupted"),
    pytest.param(ZeroDivisionError(), ZeroDivisionError, id="defect"),
]


@pytest.mark.parametrize(("error", "kind"), FAILURES)
@pytest.mark.parametrize("method", ["write", "sync", "seal"])
def test_a_failing_writer_leaves_a_folder_to_go_on_with(
    method: str,
    error: BaseException,
    kind: type[BaseException],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output_writing, "CHECKPOINT_BYTES", 1)
    calls = []
    original = getattr(Writer, method)

    def fail(self: Writer, *args: Any) -> Any:
        calls.append(args)
        if method == "seal" or len(calls) == 20:
            raise error
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, method, fail)
        with pytest.raises(kind) as caught:
            execute(plan, tmp_path / "out")
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'out'} cannot be written: No space left on device"
        assert caught.value.__notes__ == [
            f"{tmp_path / 'out'} is unfinished: run the same command with --resume to finish it"
        ]
    go_on(sample("deepseek_v3", "bf16"), tmp_path / "out", tmp_path)


def test_an_interruption_between_two_slabs_leaves_a_folder_to_go_on_with(plan: Plan, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=interrupt)
    assert len(calls) == 5
    go_on(sample("deepseek_v3", "bf16"), tmp_path / "out", tmp_path)


def test_streams_are_used_again_whatever_ended_a_run(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[mx.Stream] = []
    new_stream = mx.new_thread_unsafe_stream
    monkeypatch.setattr(mx, "new_thread_unsafe_stream", lambda d: made.append(new_stream(d)) or made[-1])
    monkeypatch.setattr(executing, "_idle_streams", {"cpu": [], "gpu": []})

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    def fail(*given: Any, **named: Any) -> None:
        mx.async_eval(mx.zeros((1000, 1000)).sum())
        raise MlaToolsError("a defect in the data")

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "interrupted", workload=slabs_of(3000), progress=interrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "transform", fail)
        with pytest.raises(MlaToolsError, match="a defect"):
            execute(plan, tmp_path / "failed", workload=slabs_of(3000))
    for name in ("first", "second"):
        execute(plan, tmp_path / name, workload=slabs_of(3000))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert 1 <= len(made) <= 2
    # Each lies there once, for the next.
    idle = [stream for streams in executing._idle_streams.values() for stream in streams]
    assert sorted(map(str, idle)) == sorted(map(str, made))


def test_what_is_done_is_not_done_again(plan: Plan, tmp_path: Path) -> None:
    before: list[int] = []

    def interrupt(nbytes: int) -> None:
        before.append(nbytes)
        if sum(before) > plan.nbytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", workload=slabs_of(3000, threads=1), progress=interrupt)
    after: list[int] = []
    execute(plan, tmp_path / "out", resume=True, progress=after.append)
    assert sum(after) == plan.nbytes
    # What is lost is that of the tensors under way: stacks, whose experts lie far apart.
    assert after[0] > plan.nbytes // 10


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
            (there / "mine.txt").write_text("precious")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(MlaToolsError, match="already exists"):
            check_output(out, **flags)
        with pytest.raises(MlaToolsError, match="already exists"):
            execute(plan, out, **flags)
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


def test_values_are_those_of_the_source(tmp_path: Path) -> None:
    # One tensor of each op, read with mlx and laid out with numpy.
    source, out = sample("kimi_linear", "bf16"), tmp_path / "out"
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
