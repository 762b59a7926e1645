"""The output against mlx-lm's own class: what is compared, and how the child process is asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

from mla_tools.architectures import MODEL_TYPES
from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.plan import Options, make_plan
from mla_tools.sample import write_sample
from mla_tools.verify import ManifestCheck, compare, verify_output
from mla_tools.verify.child import manifest

Shapes = dict[str, list[int]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v3"
    write_sample("deepseek_v3", folder)
    return folder


def output(source: Path, out: Path, *flags: str) -> tuple[dict[str, Any], Shapes]:
    """Convert, and return config and shapes as they stand in the output."""
    convert(source, out, *flags)
    checkpoint = open_checkpoint(out)
    shapes = {name: list(stored.spec.shape) for name, stored in checkpoint.tensors.items()}
    return json.loads((out / "config.json").read_text()), shapes


def test_equal_sides_have_no_differences() -> None:
    assert compare({"a": [2, 3], "b": []}, {"b": (), "a": (2, 3)}) == []
    assert compare({}, {}) == []


def test_all_three_kinds_of_differences_are_named() -> None:
    stored = {"a": [2, 3], "more": [1], "same": [4]}
    declared = {"a": [3, 2], "same": [4], "wanted": [5, 6]}
    found = {problem.subject: problem for problem in compare(stored, declared)}
    assert list(found) == ["a", "more", "wanted"]
    assert "another shape" in found["a"].what
    assert (found["a"].needed, found["a"].found) == ("[3, 2]", "[2, 3]")
    assert "no such parameter" in found["more"].what
    assert found["more"].found == "[1]"
    assert "wants this parameter" in found["wanted"].what
    assert found["wanted"].needed == "[5, 6]"


FLAGS = {"plain": [], "affine": ["-q"], "mxfp8": ["-q", "--q-mode", "mxfp8"],
         "mixed": ["-q", "--quant-predicate", "mixed_3_6"]}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_the_manifest_of_an_output_is_what_is_in_it(flags: str, source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out", *FLAGS[flags])
    assert manifest(config, shapes) == shapes
    assert any(name.endswith(".scales") for name in shapes) == (flags != "plain")


def test_a_tensor_that_is_dense_is_expected_dense(source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out", "-q")
    name = "model.layers.1.self_attn.o_proj"
    for part in ("scales", "biases"):
        del shapes[f"{name}.{part}"]
    assert [problem.subject for problem in compare(shapes, manifest(config, shapes))] == [f"{name}.weight"]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_module_of_a_quantized_family_is_in_the_manifest(family: str, tmp_path: Path) -> None:
    write_sample(family, tmp_path / "sample")
    config, shapes = output(tmp_path / "sample", tmp_path / "out", "-q")
    assert compare(shapes, manifest(config, shapes)) == []


def test_the_child_agrees_with_an_output(source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out", "-q")
    check = ManifestCheck(config, shapes)
    check.wait()
    check.cancel()  # may come after wait, as `finally` has it


def test_the_child_lists_every_difference(source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out")
    del shapes["model.norm.weight"]
    shapes["lm_head.weight"] = [1, 2]
    shapes["model.extra"] = [3]
    check = ManifestCheck(config, shapes)
    try:
        with pytest.raises(CheckpointError) as caught:
            check.wait()
    finally:
        check.cancel()
    subjects = [problem.subject for problem in caught.value.problems]
    assert subjects == ["lm_head.weight", "model.extra", "model.norm.weight"]


def test_a_config_that_mlx_lm_cannot_build_is_said_in_its_words(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    check = ManifestCheck({**config, "model_type": "kimi_linear"}, {})
    try:
        with pytest.raises(MlaToolsError, match=r"mlx-lm cannot build this model: .*missing.*head_dim"):
            check.wait()
    finally:
        check.cancel()


def test_a_model_type_that_mlx_lm_lacks_is_said_in_its_words() -> None:
    check = ManifestCheck({"model_type": "no_such_model"}, {})
    try:
        with pytest.raises(MlaToolsError, match="Model type no_such_model not supported"):
            check.wait()
    finally:
        check.cancel()


def test_cancel_ends_the_child_and_may_come_twice() -> None:
    check = ManifestCheck({"model_type": "deepseek_v3"}, {})
    child = check._child
    check.cancel()
    assert child.poll() is not None
    assert check._out.closed
    assert check._err.closed
    check.cancel()


def test_a_look_waits_for_nothing_and_raises_what_is_known(source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out")
    for stored, agrees in ((shapes, True), ({}, False)):
        check = ManifestCheck(config, stored)
        os.kill(check._child.pid, signal.SIGSTOP)
        check.look()
        os.kill(check._child.pid, signal.SIGCONT)
        try:
            check._child.wait()
            with nullcontext() if agrees else pytest.raises(CheckpointError):
                check.look()
            with nullcontext() if agrees else pytest.raises(CheckpointError):
                check.wait()
        finally:
            check.cancel()


def test_the_child_imports_no_tokenizers() -> None:
    asked = """
import sys
from mla_tools.verify.child import _import_mlx_lm, model_classes
_import_mlx_lm()
for family in sys.argv[1:]:
    print(model_classes({"model_type": family})[0].__module__.rpartition(".")[2])
print("transformers" in sys.modules)
"""
    written = {family.model_type for family in MODEL_TYPES.values()}
    child = subprocess.run([sys.executable, "-c", asked, *written], capture_output=True, text=True)
    *modules, tokenizers = child.stdout.split()
    assert len(modules) == len(written), child.stderr
    assert tokenizers == "False"


# utils.py of an imagined mlx-lm -> what of the package is imported
UTILS = {
    "as it is": ("from .tokenizer_utils import anything", "without"),
    "with a need of the package": ("from mlx_lm import generator", "with"),
}


@pytest.mark.parametrize("utils", UTILS)
def test_what_mlx_lm_begins_with_is_imported_where_it_is_needed(utils: str, tmp_path: Path) -> None:
    text, expected = UTILS[utils]
    package = tmp_path / "mlx_lm"
    package.mkdir()
    (package / "__init__.py").write_text("generator = 1")
    (package / "tokenizer_utils.py").write_text("anything = 1")
    (package / "utils.py").write_text(text)
    asked = """
import sys
from mla_tools.verify.child import _import_mlx_lm
_import_mlx_lm()
assert "mlx_lm.utils" in sys.modules
print("with" if hasattr(sys.modules["mlx_lm"], "generator") else "without")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment)
    assert child.stdout.strip() == expected, child.stderr


# --- an output and what it says of itself ------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_sample("deepseek_v3", folder / "source")
    execute(make_plan(open_checkpoint(folder / "source"), Options()), folder / "out")
    return folder / "out"


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


def test_an_output_is_as_it_was_written(out: Path) -> None:
    read: list[int] = []
    found = verify_output(out, progress=read.append)
    names = [path for path in out.iterdir() if path.name != "mla_tools.json"]
    assert (found.files, found.notes) == (len(names), ())
    assert found.nbytes == sum(path.stat().st_size for path in names) == sum(read)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = {
    "a flipped bit": (flip, "has other bytes"),
    "cut short": (cut, "has another size"),
    "gone": (Path.unlink, "is not there"),
    "a link to nowhere": (link, "is not there"),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_is_named(damage: str, name: str, out: Path) -> None:
    harm, text = DAMAGES[damage]
    harm(out / name)
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    assert any(problem.subject == name and text in problem.what for problem in caught.value.problems)


def test_quick_compares_all_but_the_bytes(out: Path) -> None:
    flip(out / "model.safetensors")
    verify_output(out, quick=True)
    cut(out / "model.safetensors")
    with pytest.raises(CheckpointError):
        verify_output(out, quick=True)


def test_a_stray_file_that_mlx_lm_would_load_is_named(out: Path) -> None:
    shutil.copy(out / "model.safetensors", out / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="mlx-lm would load it"):
        verify_output(out)


def test_an_unfinished_folder_is_said_to_be_one(out: Path) -> None:
    (out / "mla_tools.journal-00000.jsonl").write_text("{}\n")
    with pytest.raises(MlaToolsError, match="unfinished"):
        verify_output(out)


RECORDS = {
    "absent": None,
    "not JSON": "{",
    "a list": "[]",
    "no files": "{}",
    "files of another kind": '{"files": {"a": 1}}',
    "a path out of the folder": '{"files": {"../a": {"bytes": 1, "sha256": "0"}}}',
    "a size that is none": '{"files": {"a": {"bytes": true, "sha256": "0"}}}',
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_folder_without_a_usable_record_is_refused(record: str, out: Path) -> None:
    (out / "mla_tools.json").unlink()
    text = RECORDS[record]
    if text is not None:
        (out / "mla_tools.json").write_text(text)
    with pytest.raises(MlaToolsError, match="nothing to compare it with"):
        verify_output(out)
