"""Output folders in which somebody has put something: nothing outside of them is touched, and nobody's file
is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from attacks import outputs
from attacks.outputs import CLEARING, RECORD, Files, bench, line, signed

from mla_tools.cli import main
from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.directory import Directory
from mla_tools.output import check_output, folder, writing
from mla_tools.plan import files as plan_files
from mla_tools.verify import verify_output

FIRST_JOURNAL = "mla_tools.journal-00000.jsonl"
FLAGS = {"plain": [], "resume": ["--resume"], "overwrite": ["--overwrite"]}


class Agrees:
    """In the place of the question to mlx-lm."""

    def __init__(self, *given: object) -> None:
        pass

    def look(self) -> None:
        pass

    wait = cancel = look


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", outputs.SHARD_BYTES)
    monkeypatch.setattr(writing, "CHECKPOINT_BYTES", outputs.CHECKPOINT_BYTES)
    monkeypatch.setattr(folder, "SMALL_FILES", 0)
    monkeypatch.setattr("mla_tools.verify.ManifestCheck", Agrees)


@cache
def states() -> dict[str, Files]:
    """Return a folder of each kind: empty, begun, half done, sealed, half published, cleared and finished."""
    made = {name: files for name, files in bench().states.items() if files}
    mine = {name: files for name, files in made.items() if name.startswith("new")}
    sealed = [files for files in mine.values() if b'"file":' in files.get(FIRST_JOURNAL, b"")]
    published = [files for files in mine.values() if RECORD in files and FIRST_JOURNAL in files]
    begun = [files for files in mine.values() if b'"done":' in files.get(FIRST_JOURNAL, b"")]
    clearing = [files for name, files in made.items() if name.startswith("replaced") and CLEARING in files]
    return {
        "empty": {},
        "unfinished": begun[0],
        "sealed": next(files for files in sealed if RECORD not in files),
        "published": published[0],
        "clearing": clearing[len(clearing) // 2],
        "finished": bench().wanted,
    }


STATES = ("empty", "unfinished", "sealed", "published", "clearing", "finished")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def fill(out: Path, state: str) -> None:
    for name, data in states()[state].items():
        (out / name).write_bytes(data)


def run(out: Path, *flags: str) -> int:
    return main(["convert", str(bench().root / "source"), "--mlx-path", str(out), *flags])


def seen(folder: Path) -> dict[str, Any]:
    return outputs._seen(folder, identity=True)


def test_the_states_are_what_they_are_called() -> None:
    found = states()
    assert not any(name.endswith(".safetensors") for name in found["unfinished"])
    assert any(name.endswith(".partial") for name in found["unfinished"])
    assert RECORD not in found["sealed"]
    assert outputs.partial("model.safetensors.index.json") in found["published"]
    assert CLEARING in found["clearing"]
    assert FIRST_JOURNAL not in found["finished"]


# --- links ---------------------------------------------------------------------------------------------

PLANTED = (
    *(FIRST_JOURNAL, "mla_tools.journal-00003.jsonl", CLEARING, RECORD, "config.json", "tokenizer.json"),
    *("config.json.partial", "tokenizer.json.partial", "mla_tools.json.partial"),
    *("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors.partial"),
    "model.safetensors.index.json.partial",
)  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", ["symlink", "hard link"])
@pytest.mark.parametrize("state", STATES)
def test_a_link_to_somebody_elses_file_is_refused_by_its_name(
    state: str, kind: str, flags: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PLANTED:
        for path in out.iterdir():
            path.unlink()
        fill(out, state)
        others = tmp_path / name
        others.mkdir()
        victim = others / "victim"
        # What stood there, or what could be taken for it: the content is no reason to refuse it.
        victim.write_bytes(states()[state].get(name, b"mine\n"))
        (out / name).unlink(missing_ok=True)
        if kind == "symlink":
            (out / name).symlink_to(victim)
        else:
            (out / name).hardlink_to(victim)
        before, held = seen(others), seen(out)
        code = run(out, *FLAGS[flags])
        assert seen(others) == before, name
        said = capsys.readouterr().err
        if flags == "resume" and state == "finished" and "journal" not in name and code == 0:
            # Complete, by its record and its sizes; verify lists the other files.
            assert name.endswith(".partial") or kind == "hard link"
            continue
        assert code == 1, (name, said)
        assert seen(out) == held, name
        if flags != "plain":
            assert said.startswith("error: "), said
            assert name in said or state == "empty", said
            assert "--resume" not in said, (name, said)
        # Once it is taken away, and what was there lies there again, all is well.
        (out / name).unlink()
        if name in states()[state]:
            (out / name).write_bytes(states()[state][name])
        if flags != "plain" and state != "clearing":
            assert run(out, *FLAGS[flags]) == 0
            verify_output(out)
            capsys.readouterr()


# --- what no reader may wait for or read ---------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, outputs.SPARSE)


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "device": device,
    "folder": Path.mkdir,
    "20 GB": sparse,
}
ACTIONS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda out: execute(bench().plan, out, resume=True),
    "overwrite": lambda out: execute(bench().plan, out, overwrite=True),
    "verify": verify_output,
    "quick": lambda out: verify_output(out, quick=True),
    "check": lambda out: check_output(out, resume=True),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", [RECORD, FIRST_JOURNAL, CLEARING])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_record_or_a_journal_that_is_none_is_named_and_not_read(
    state: str, odd: str, name: str, action: str, out: Path
) -> None:
    fill(out, state)
    (out / name).unlink(missing_ok=True)
    ODD[odd](out / name)
    before = seen(out)
    if (state, odd, action) == ("finished", "20 GB", "resume") and name != RECORD:
        # All that is left to do in a complete folder is to end the journals, whatever is in them.
        assert not execute(bench().plan, out, resume=True)
        assert outputs._files(out) == bench().wanted
        return
    with outputs._bounded(), pytest.raises(MlaToolsError) as caught:
        ACTIONS[action](out)
    said = str(caught.value)
    # To verify, a journal of any kind says that the folder is unfinished.
    assert name in said or ("is unfinished" in said and action in ("verify", "quick"))
    assert seen(out) == before


# --- files that come while others go -------------------------------------------------------------------


@pytest.mark.parametrize("way", ["new", "replaced"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_file_that_comes_while_the_old_ones_go_stays(
    at: int,
    way: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(out, "finished")
    # Removed last, so that it is there when it is replaced.
    path = out / ("thesis.txt" if way == "new" else "tokenizer_config.json")
    calls: list[str] = []
    remove = Directory.remove

    def removing(self: Directory, name: str, *known: Any) -> bool:
        calls.append(name)
        if len(calls) == at:
            path.unlink(missing_ok=True)
            path.write_text("mine")
        return remove(self, name, *known)

    monkeypatch.setattr(Directory, "remove", removing)
    assert run(out, "--overwrite") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out} was changed while it was being replaced"), said
    assert path.name in said
    assert path.read_text() == "mine"
    monkeypatch.setattr(Directory, "remove", remove)
    if way == "new":
        # It is nobody's fault twice: the same command says so again, and continues once it is away.
        assert run(out, "--overwrite") == 1
        assert path.read_text() == "mine"
        assert "thesis.txt" in capsys.readouterr().err
    path.rename(out.parent / "kept")
    assert run(out, "--overwrite") == 0
    assert outputs._files(out) == bench().wanted
    assert (out.parent / "kept").read_text() == "mine"


# --- what the fuzzer found -----------------------------------------------------------------------------


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the record of the finished folder with a change and a sound digest."""
    value = json.loads(bench().wanted[RECORD])
    change(value)
    return signed(value)


@pytest.mark.parametrize("name", ["\ud800", "x" * 300, "n" * 70_000])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_record_that_names_what_no_file_is_called_is_a_sentence(action: str, name: str, out: Path) -> None:
    fill(out, "finished")
    entry = {"bytes": 1, "sha256": "0" * 64}
    (out / RECORD).write_bytes(forged(lambda value: value["files"].update({name: entry})))
    if action == "check" or (action == "overwrite" and name[0] != "\ud800"):
        return
    with pytest.raises(MlaToolsError) as caught:
        ACTIONS[action](out)
    str(caught.value).encode()
    assert len(str(caught.value)) < 2000
    assert "has changed since it was written" in str(caught.value) or action != "resume" or name == "\ud800"


def test_a_record_with_strange_keys_is_told_in_text_that_can_be_printed(out: Path) -> None:
    fill(out, "finished")
    more = {"\ud800\x1b[31m": 1, "x" * 70_000: {}, "": None}
    (out / RECORD).write_bytes(forged(lambda value: value["options"].update(more)))
    with pytest.raises(MlaToolsError, match="is the output of another plan") as caught:
        execute(bench().plan, out, resume=True)
    str(caught.value).encode()
    assert "options.'\\ud800\\x1b[31m': is gone" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_record_that_is_nested_deeply_is_no_record(out: Path) -> None:
    fill(out, "finished")
    # As deep as it can be read, and too deep to be written.
    for depth in (300, 600, 900, 1200, 5000, 100_000):
        text = bench().wanted[RECORD].decode().rstrip().removesuffix("}")
        (out / RECORD).write_text(text + ', "x": ' + "[" * depth + "]" * depth + "}\n")
        for action in ("verify", "resume", "overwrite"):
            with pytest.raises(MlaToolsError):
                ACTIONS[action](out)


def test_a_record_of_a_hundred_thousand_files_is_answered_in_a_few_lines(out: Path) -> None:
    fill(out, "finished")
    entry = {"bytes": 10**30, "sha256": "0" * 64}
    more = {f"file {number}": entry for number in range(100_000)}
    (out / RECORD).write_bytes(forged(lambda value: value["files"].update(more)))
    with pytest.raises(MlaToolsError) as caught:
        execute(bench().plan, out, resume=True)
    assert str(caught.value).endswith("file 0, file 1, file 2, file 3 and 99996 more")


def test_a_journal_is_read_with_as_much_memory_as_it_is_long(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(out, "unfinished")
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))  # type: ignore[func-returns-value]
    execute(bench().plan, out, resume=True)
    assert asked
    assert max(asked) < 1 << 20


OTHERS = (
    "mla_tools.journal-\u0660\u0660\u0660\u0660\u0660.jsonl",
    "config.json.partial.partial",
    "x.partial",
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("state", ["clearing", "finished"])
def test_a_name_that_is_almost_one_of_this_tools_is_left_alone(state: str, name: str, out: Path) -> None:
    fill(out, state)
    (out / name).write_text("mine")
    with pytest.raises(MlaToolsError, match="holds files that this tool did not make"):
        execute(bench().plan, out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_a_link_as_long_as_its_file_is_not_taken_for_it(out: Path) -> None:
    fill(out, "finished")
    path = out / "generation_config.json"
    size = path.stat().st_size
    path.unlink()
    path.symlink_to("n" * size)
    assert path.lstat().st_size == size
    with pytest.raises(MlaToolsError, match=path.name):
        execute(bench().plan, out, resume=True)


def test_a_file_with_a_second_name_is_not_removed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (out / "a").hardlink_to(tmp_path / "victim")
    (out / "b").symlink_to(tmp_path / "victim")
    with Directory(out) as opened:
        for name in ("a", "b"):
            for harm in (opened.remove, lambda name: opened.rename(name, "c")):
                with pytest.raises(MlaToolsError, match=f"{name} (is a link|has another name)"):
                    harm(name)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]


def test_lines_of_a_journal_that_say_strange_things_are_passed_over(out: Path) -> None:
    fill(out, "unfinished")
    with (out / FIRST_JOURNAL).open("ab") as journal:
        for value in outputs.LINES:
            if "file" not in value or value["file"] != "model-00001-of-00002.safetensors":
                journal.write(line(value) if "done" not in value else line({"done": [5, [], [0], [-1, []]]}))
    shutil.copy(out / FIRST_JOURNAL, out.parent / "journal")
    assert execute(bench().plan, out, resume=True)
    assert outputs._files(out) == bench().wanted
