"""The output against mlx-lm's own class: what is compared, and how the child process is asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

from mla_tools.architectures import MODEL_TYPES
from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.output import INDEX
from mla_tools.plan import files as plan_files
from mla_tools.plan import make_plan
from mla_tools.samples import write_sample
from mla_tools.verify import ManifestCheck, asking, compare, verify_output
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
    assert "needs this parameter" in found["wanted"].what
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
    assert child._process.poll() is not None
    assert child._out.closed
    assert child._err.closed
    check.cancel()


def test_a_look_waits_for_nothing_and_raises_what_is_known(source: Path, tmp_path: Path) -> None:
    config, shapes = output(source, tmp_path / "out")
    for stored, agrees in ((shapes, True), ({}, False)):
        check = ManifestCheck(config, stored)
        os.kill(check._child._process.pid, signal.SIGSTOP)
        check.look()
        os.kill(check._child._process.pid, signal.SIGCONT)
        try:
            check._child._process.wait()
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
    "a flipped bit": (flip, "was changed since it was written"),
    "cut short": (cut, "has another size"),
    "gone": (Path.unlink, "is missing"),
    "a link to nowhere": (link, "is missing"),
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


def test_no_bit_of_the_record_can_change(out: Path) -> None:
    path = out / "mla_tools.json"
    data = path.read_bytes()
    positions = range(0, 8 * len(data), 61)
    assert len(positions) > 600
    for position in positions:
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(MlaToolsError, match="nothing to compare it with"):
            verify_output(out)
    path.write_bytes(data)
    verify_output(out)


def forge(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record, and give it the digest that fits."""
    record = json.loads((out / "mla_tools.json").read_text())
    change(record)
    del record["sha256"]
    rest = json.dumps(record, indent=4) + "\n"
    record["sha256"] = hashlib.sha256(rest.encode()).hexdigest()
    (out / "mla_tools.json").write_text(json.dumps(record, indent=4) + "\n")


def test_a_record_that_is_forged_soundly_is_read(out: Path) -> None:
    forge(out, lambda record: record["notes"].append("forged"))
    verify_output(out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", INDEX])
def test_a_file_is_not_lost_by_losing_its_entry(name: str, out: Path) -> None:
    flip(out / name)
    forge(out, lambda record: record["files"].pop(name))
    with pytest.raises(MlaToolsError, match=f"its files lack {re.escape(name)}, so there is nothing"):
        verify_output(out)


@pytest.mark.parametrize(("name", "listed"), [("model.safetensors", "files"), ("tokenizer.json", "copied")])
def test_a_file_that_the_record_does_not_know_at_all_is_a_stray(name: str, listed: str, out: Path) -> None:
    flip(out / name)

    def change(record: dict[str, Any]) -> None:
        del record["files"][name]
        names = record["output"][listed]
        names.remove(name) if isinstance(names, list) else names.pop(name)

    forge(out, change)
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    (problem,) = caught.value.problems
    assert (problem.subject, "was not written by the conversion" in problem.what) == (name, True)


STRAYS = {
    "chat_template.jinja": False,
    "modeling_x.py": False,
    "adapters.safetensors": False,
    "model.safetensors": True,
    "model-00002-of-00002.safetensors": True,
    "thesis.txt": False,
    "pytorch_model.bin": False,
    "folder/": False,
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_a_reader_could_open_is_a_problem(name: str, converted_in_shards: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted_in_shards, tmp_path / "out"))
    path = out / name
    path.mkdir() if name.endswith("/") else path.write_bytes((out / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    (problem,) = [problem for problem in caught.value.problems if "not written by" in problem.what]
    assert problem.subject == path.name
    assert ("mlx-lm would load it" in problem.what) == STRAYS[name]


@pytest.fixture(scope="module")
def converted_in_shards(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_files, "SHARD_BYTES", 2_000_000)
        execute(make_plan(open_checkpoint(converted.parent / "source"), Options()), out)
    assert not (out / "model.safetensors").exists()
    return out


def test_what_no_reader_opens_is_a_note(out: Path) -> None:
    for name in (".gitattributes", "README.md", "LICENSE"):
        (out / name).write_text("mine")
    (out / ".git").mkdir()
    found = verify_output(out)
    assert found.notes == tuple(
        f"{name} was not written by the conversion"
        for name in (".git", ".gitattributes", "LICENSE", "README.md")
    )


def in_the_header(path: Path) -> None:
    """Flip one bit of a name in the metadata, after which the header is JSON as before."""
    data = bytearray(path.read_bytes())
    data[data.index(b"format")] ^= 1
    path.write_bytes(data)
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length])


def in_a_text(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'": ', b'" :', 1))
    assert json.loads(path.read_text()) == json.loads(data)


@pytest.mark.parametrize(
    ("name", "harm", "what"),
    [
        ("model.safetensors", in_the_header, "has another header"),
        ("config.json", in_a_text, "was changed since it was written"),
        (INDEX, in_a_text, "was changed since it was written"),
        ("tokenizer.json", flip, "was changed since it was written"),
    ],
)
def test_quick_reads_headers_and_all_small_files(
    name: str, harm: Callable[[Path], None], what: str, out: Path
) -> None:
    harm(out / name)
    with pytest.raises(CheckpointError) as caught:
        verify_output(out, quick=True)
    (problem,) = [problem for problem in caught.value.problems if problem.what == what]
    assert problem.subject == name


def test_a_snapshot_of_the_hubs_cache_is_an_output(out: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(out.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blobs / digest)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    assert verify_output(snapshot).notes == ()
    flip((snapshot / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match="was changed since it was written"):
        verify_output(snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_a_problem_whatever_it_leads_to(
    name: str, out: Path, tmp_path: Path
) -> None:
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    assert any((p.subject, p.what) == (name, "is a link out of the folder") for p in caught.value.problems)


# --- a child that comes to no answer -------------------------------------------------------------------

UNASKED = "It could not be checked whether the installed mlx-lm loads this model: "


def unasked(config: Any = None) -> str:
    """Ask, and return why there was no answer."""
    check = ManifestCheck(config or {"model_type": "deepseek_v3"}, {})
    try:
        with pytest.raises(MlaToolsError) as caught:
            check.wait()
    finally:
        check.cancel()
    assert "cannot build this model" not in str(caught.value)
    assert str(caught.value).startswith(UNASKED)
    return str(caught.value).removeprefix(UNASKED)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL"),
        ("import os; os.abort()", "its process was ended by SIGABRT"),
        ("import os; os._exit(3)", "no reason was given"),
        ("raise ImportError('no such library')", "ImportError: no such library"),
        ("", "its answer was cut off"),
        ("print('rubbish')", "its answer was cut off"),
        ("print('{\"manifest\": {')", "its answer was cut off"),
        ("import os; os.write(1, bytes([255, 254]))", "its answer was cut off"),
        ("print('[]')", "its answer is not valid"),
        ("print('5')", "its answer is not valid"),
        ("print('{}')", "its answer is not valid"),
        ("print('{\"manifest\": 5}')", "its answer is not valid"),
        ("print('{\"refused\": null}')", "its answer is not valid"),
    ],
)
def test_a_child_that_comes_to_no_answer_says_nothing_about_the_model(
    code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_CHILD", code)
    assert unasked().startswith(f"{why}. The model may be right")


def test_a_child_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(MlaToolsError) as caught:
        ManifestCheck({"model_type": "deepseek_v3"}, {})
    assert str(caught.value).startswith(f"{UNASKED}its process cannot be started (No such file or directory)")


def test_where_there_is_no_mlx_lm_it_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").touch()
    path = [str(tmp_path), *asking.child_path()]
    monkeypatch.setattr(asking, "child_path", lambda: path)
    assert unasked().startswith("ModuleNotFoundError: No module named 'mlx_lm.utils'. The model may be right")


def test_what_was_found_whole_is_said_beside_what_was_not(out: Path) -> None:
    (out / "stray.py").write_text("")
    (out / "README.md").write_text("")
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    assert [problem.subject for problem in caught.value.problems] == ["stray.py"]
    assert caught.value.__notes__ == [
        "All 6 files of the conversion are unchanged.",
        "README.md was not written by the conversion",
    ]
    flip(out / "config.json")
    with pytest.raises(CheckpointError) as caught:
        verify_output(out)
    assert [problem.subject for problem in caught.value.problems] == ["config.json", "stray.py"]
    assert caught.value.__notes__ == ["README.md was not written by the conversion"]


@pytest.mark.parametrize(
    "name", ["LICENSE.py", "README.json", "NOTICE.safetensors", "._x.py", "LICENSE.jinja"]
)
def test_a_name_of_a_document_does_not_hide_what_a_reader_opens(name: str, out: Path) -> None:
    (out / name).write_text("")
    with pytest.raises(CheckpointError, match=f"{name}: was not written by the conversion"):
        verify_output(out)
