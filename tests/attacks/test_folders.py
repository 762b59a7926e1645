"""Hostile and broken checkpoint folders: all problems are reported at once, and nothing leads out of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from attacks.hostile import entry, folder_with_config, index, shard, table
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import open_checkpoint

NO_CONFIGS = {
    "list": (b"[]", "config.json: is not a JSON object"),
    "not JSON": (b"{", "config.json: is not JSON: Expecting property name"),
    "not UTF-8": (b'{"a": "\xff"}', "config.json: is not UTF-8 text (byte 7)"),
    "deep": (b'{"a":' + b"[" * 200_000, "config.json: is nested too deeply"),
    "huge": (
        b" " * (16 << 20) + b"{}",
        "config.json: is too large\n  needed  at most 16,777,216",
    ),
    "empty": (b"", "config.json: is not JSON"),
}


@pytest.mark.parametrize(("data", "text"), NO_CONFIGS.values(), ids=NO_CONFIGS.keys())
def test_a_config_that_is_none_stops_everything(tmp_path: Path, data: bytes, text: str) -> None:
    shard(tmp_path, "model.safetensors", "a")
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert text in str(caught.value)


NO_WEIGHTS = {
    "nothing": ([], "needed  model*.safetensors\n  Download the weights into this folder."),
    "pickles": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "found   pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin\n"
        "  Pickle files are refused, because loading one can run code: convert to safetensors first.",
    ),
    "one pickle": (["consolidated.00.pth"], "Pickle files are refused, because loading one can run code"),
    "torch": (["model.pt"], "convert to safetensors first"),
    "gguf": (
        ["model-Q4_K_M.gguf"],
        "found   model-Q4_K_M.gguf\n  A folder of GGUF files is not a safetensors",
    ),
}


@pytest.mark.parametrize(("files", "text"), NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path, files: list[str], text: str) -> None:
    folder_with_config(tmp_path)
    for file in files:
        (tmp_path / file).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert f"{tmp_path}: holds no safetensors files\n" in str(caught.value)
    assert text in str(caught.value)


def test_an_index_without_any_file_says_how_many_it_names(tmp_path: Path) -> None:
    index(folder_with_config(tmp_path), {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"})
    with pytest.raises(CheckpointError, match="found   an index that names 2 files, none of which is there"):
        open_checkpoint(tmp_path)


def test_a_folder_of_adapters_is_no_model(tmp_path: Path) -> None:
    shard(folder_with_config(tmp_path), "adapter_model.safetensors", "a")
    with pytest.raises(CheckpointError, match="holds adapters but no model") as caught:
        open_checkpoint(tmp_path)
    assert "give the folder of the model" in str(caught.value)


def test_what_is_no_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name, text in {
        "none": "there is no such folder\n  Check the path.",
        "file": "is not a folder\n  Give the folder that holds config.json",
        "loop": "cannot be read\n  found   Too many levels of symbolic links",
        "a\0b": "cannot be read\n  found   embedded null byte",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / name)
        assert text in str(caught.value)


def test_nothing_to_go_on_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert [problem.what for problem in caught.value.problems] == [
        "there is no config.json in it",
        "holds no safetensors files",
    ]
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match="This is a hub cache: give one of the folders in"):
        open_checkpoint(tmp_path)


FILES = {
    "parent": ("../secret.safetensors", "is not in the folder"),
    "absolute": ("/etc/secret.safetensors", "is not in the folder"),
    "subfolder": ("sub/a.safetensors", "is not in the folder"),
    "backslash": ("..\\a.safetensors", "is not in the folder"),
    "dots": ("..", "is not in the folder"),
    "empty": ("", "is not a file name"),
    "NUL": ("a\0.safetensors", "is not a file name"),
    "hidden": (".a.safetensors", "is a hidden file"),
    "pickle": ("pytorch_model.bin", "is not a safetensors file"),
}


@pytest.mark.parametrize(("file", "fault"), FILES.values(), ids=FILES.keys())
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: str, fault: str) -> None:
    folder = folder_with_config(tmp_path / "model")
    shard(folder, "model.safetensors", "a")
    shard(tmp_path, "secret.safetensors", "b.0")
    index(folder, {"a": "model.safetensors", "b.0": file, "b.1": file})
    checkpoint = open_checkpoint(folder)
    (problem,) = checkpoint.problems
    assert problem.what == f"the index names this file, but it {fault}"
    assert problem.lost == ("b.0", "b.1")
    assert checkpoint.tensors.keys() == {"a"}
    assert checkpoint.lost.keys() == {"b.0", "b.1"}
    assert all(reason.endswith(fault) for reason in checkpoint.lost.values())
    str(problem).encode()


def test_a_shard_that_is_a_folder_a_pipe_or_a_dead_link_is_a_problem(tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path)
    shard(folder, "a.safetensors", "a")
    (folder / "b.safetensors").mkdir()
    os.mkfifo(folder / "c.safetensors")
    (folder / "d.safetensors").symlink_to("gone")
    index(folder, {name: f"{name}.safetensors" for name in "abcd"})
    checkpoint = open_checkpoint(folder)
    assert [(problem.subject, problem.what, problem.found) for problem in checkpoint.problems] == [
        ("b.safetensors", "is not a regular file", "a folder"),
        ("c.safetensors", "is not a regular file", "a pipe or a device"),
        ("d.safetensors", "is not there", ""),
    ]
    assert checkpoint.lost["d"] == "d.safetensors is damaged or unreadable: is not there"
    assert checkpoint.tensors.keys() == {"a"}


INDEXES = {
    "not JSON": (b"{", "is not JSON: Expecting property name"),
    "list": (b"[]", "is not a JSON object"),
    "no weight_map": (b'{"metadata": {}}', "has no object weight_map"),
    "weight_map a list": (b'{"weight_map": ["a"]}', "has no object weight_map"),
    "huge": (b" " * (64 << 20) + b"{}", "is too large"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is not JSON: Expecting value"),
    "deep": (b'{"weight_map":' * 100_000, "is nested too deeply"),
}


@pytest.mark.parametrize(("data", "text"), INDEXES.values(), ids=INDEXES.keys())
def test_without_a_usable_index_the_files_are_still_read(tmp_path: Path, data: bytes, text: str) -> None:
    shard(folder_with_config(tmp_path), "model-00001-of-00002.safetensors", "a")
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    checkpoint = open_checkpoint(tmp_path)
    assert [problem.subject for problem in checkpoint.problems] == [
        "model.safetensors.index.json",
        "model-*-of-00002.safetensors",
    ]
    assert text in checkpoint.problems[0].what
    assert checkpoint.tensors.keys() == {"a"}


def test_values_that_are_no_names_are_one_problem(tmp_path: Path) -> None:
    shard(folder_with_config(tmp_path), "model.safetensors", "a", "b", "c")
    index(tmp_path, {"a": "model.safetensors", "b": 3, "c": None})
    checkpoint = open_checkpoint(tmp_path)
    assert [problem.what for problem in checkpoint.problems] == ["weight_map gives no file name for b, c"]
    assert checkpoint.tensors.keys() == {"a", "b", "c"}


def test_repeated_keys_are_problems(tmp_path: Path) -> None:
    folder_with_config(tmp_path, '{"rope": {"factor": 1, "factor": 40}}')
    shard(tmp_path, "x.safetensors", "a")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "y.safetensors", "a": "x.safetensors"}}'
    )
    checkpoint = open_checkpoint(tmp_path)
    assert [(problem.subject, problem.what) for problem in checkpoint.problems] == [
        ("config.json", "has a duplicate key: factor"),
        ("model.safetensors.index.json", "has a duplicate key: a"),
    ]


def test_an_absurd_count_in_a_name_is_not_counted_through(tmp_path: Path) -> None:
    shard(folder_with_config(tmp_path), "model-1-of-999999999999999999.safetensors", "a")
    (problem,) = open_checkpoint(tmp_path).problems
    assert problem.what == "999,999,999,999,999,998 of 999,999,999,999,999,999 files are missing"
    assert problem.needed.startswith("model-2-of-999999999999999999.safetensors, model-3-of-")


def test_several_damages_are_all_reported(tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path, '{"a": 1, "a": 2}')
    files = [f"model-{k:05}-of-00006.safetensors" for k in range(1, 7)]
    shard(folder, files[0], "t.0")
    shard(folder, files[1], "t.0", "t.1")
    (folder / files[2]).write_bytes(table({"t.2": entry("U8", [9], [0, 9])}, b"1234"))
    (folder / files[3]).write_bytes(table({"t.3": entry("F4", [9], [0, 9]), "u": entry("U8", [2], [9, 10])}))
    shard(folder, files[4], "other")
    index(folder, {f"t.{k}": file for k, file in enumerate(files)} | {"t.6": "/etc/passwd"})
    checkpoint = open_checkpoint(folder)
    assert [(problem.subject, problem.what) for problem in checkpoint.problems] == [
        ("config.json", "has a duplicate key: a"),
        ("/etc/passwd", "the index names this file, but it is not in the folder"),
        (files[5], "is listed in the index but is not in the folder"),
        (files[2], "is truncated: 5 bytes are missing at the end"),
        ("t.3", "the dtype is unknown"),
        ("u", "the number of bytes does not fit the shape and the dtype"),
        (files[3], "is truncated: 10 bytes are missing at the end"),
        ("t.0", "is stored in two files"),
        ("t.4", f"the index places it in {files[4]}, but it is not there"),
    ]
    assert checkpoint.lost.keys() == {"t.2", "t.3", "t.4", "t.5", "t.6"}
    assert checkpoint.lost["t.3"] == f"{files[3]} is damaged or unreadable: t.3: the dtype is unknown"
    assert checkpoint.tensors.keys() == {"t.0", "t.1", "other"}
    assert len(checkpoint.notes) == 1
    assert str(CheckpointError(checkpoint.problems)).startswith("9 problems\n\n")


NAMES = st.sampled_from(["a", "b", "c", "model.safetensors", "x.safetensors", "..", "é\ud800", "weight_map"])
VALUES = st.recursive(
    NAMES | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(NAMES, VALUES) | VALUES | st.dictionaries(NAMES, NAMES).map(lambda m: {"weight_map": m}),
    st.booleans(),
)
@settings(deadline=None)
def test_any_index_is_used_or_reported(
    tmp_path_factory: pytest.TempPathFactory, value: object, damaged: bool
) -> None:
    folder = folder_with_config(tmp_path_factory.getbasetemp() / "any")
    shard(folder, "model.safetensors", "a", "b")
    shard(folder, "x.safetensors", "c")
    if damaged:
        (folder / "x.safetensors").write_bytes(b"{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.lost.keys() & checkpoint.tensors.keys()
    assert checkpoint.problems or not checkpoint.lost
    "\n".join([*map(str, checkpoint.problems), *checkpoint.notes, *checkpoint.lost.values()]).encode()
