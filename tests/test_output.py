"""Output folders: complete or visibly unfinished, and resumed to the same bytes after anything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pairs import ONLY_IN_ALL
from tiny import (
    CHILD,
    JOURNALS,
    SHARD_BYTES,
    StopError,
    begun,
    child,
    digests,
    lines_of,
    planned,
    uninterrupted,
    write_tiny,
)

from mla_tools.cli import main
from mla_tools.errors import DamagedError, DataError, MlaToolsError
from mla_tools.execute import check_source, execute
from mla_tools.files.directory import Directory
from mla_tools.output import INDEX, RECORD, is_complete, provenance
from mla_tools.output import folder as output_folder
from mla_tools.output import writing as output_writing
from mla_tools.plan import Plan, Workload
from mla_tools.plan import files as plan_files
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "tiny"
    write_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(output_writing, "CHECKPOINT_BYTES", 1)


@pytest.fixture
def plan(source: Path) -> Plan:
    return planned(source)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what a conversion that nothing interrupts writes."""
    made = uninterrupted(source, tmp_path_factory.mktemp("wanted") / "out")
    assert len([name for name in made if name.endswith(".safetensors")]) == 3
    return made


# --- the journal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail",
    [
        b'{"done":[[0,',
        b'{"file":"model-00001-of-00003.safetensors","sha',
        b"\0" * 50,
        b"\xff\xfe\n",
        b"[]\n",
        b"\n",
    ],
    ids=["done", "file", "zeros", "no text", "no object", "empty"],
)
@pytest.mark.parametrize("ends", [False, True], ids=["last", "in between"])
def test_a_line_that_was_cut_off_says_nothing(
    tail: bytes, ends: bool, plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    journal = begun(plan, out)
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(tail)
    if ends:  # another run was interrupted after this one
        with pytest.raises(StopError):
            execute(plan, out, resume=True, progress=_stop)
        assert journal.read_bytes().startswith(whole + tail)
    assert execute(plan, out, resume=True)
    assert digests(out) == wanted


def _stop(nbytes: int) -> None:
    raise StopError


def test_what_is_journaled_is_not_written_again(
    plan: Plan, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    journal = begun(plan, out, 0.95)
    lines = lines_of(journal)
    targets = [target for step in plan.steps for target in step.targets]
    done = {number for line in lines for number, _ in line.get("done", ())}
    kept = {name for number in done for name in targets[number].parts.values()}
    sealed = [line["file"] for line in lines if "file" in line]
    assert sealed
    kept |= {name for file in plan.files for name in file.tensors if file.name in sealed}
    written = set()
    write = output_writing.Output.write

    def noted(self: output_writing.Output, name: str, start: int, data: Any) -> None:
        written.add(name)
        write(self, name, start, data)

    monkeypatch.setattr(output_writing.Output, "write", noted)
    execute(plan, out, resume=True)
    everything = {name for file in plan.files for name in file.tensors}
    assert kept
    assert written == everything - kept
    assert digests(out) == wanted


def test_the_first_line_cut_off_starts_from_the_beginning(
    plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    journal = begun(plan, out)
    first = journal.read_bytes().splitlines()[0]
    journal.write_bytes(first[:100])
    assert execute(plan, out, resume=True)
    assert digests(out) == wanted


def test_the_journals_of_several_processes_count_together(
    plan: Plan, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    journal = begun(plan, out)
    again = Path(shutil.copytree(out, tmp_path / "again"))
    first, *lines = journal.read_text().splitlines(keepends=True)
    for rank in range(2):
        name = JOURNALS.replace("*", f"{rank:05d}")
        (out / name).write_text("".join([first, *lines[rank::2]]))
    seen = []
    execute(plan, out, resume=True, progress=seen.append)
    assert digests(out) == wanted
    alone: list[int] = []
    execute(plan, again, resume=True, progress=alone.append)
    assert seen[0] == alone[0] > 0


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "options": ({"quantize": QuantSpec()}, r"options\.quantize: was None, is \{'bits': 4, 'group_size': 64"),
    "dtype": ({"dtype": DType.F32}, r"options\.dtype: was None, is 'F32'"),
}


@pytest.mark.parametrize("complete", [False, True], ids=["unfinished", "complete"])
@pytest.mark.parametrize(("options", "text"), CHANGES.values(), ids=CHANGES)
def test_another_plan_is_told_with_all_that_differs(
    options: dict[str, Any], text: str, complete: bool, source: Path, plan: Plan, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if complete:
        execute(plan, out)
    else:
        begun(plan, out)
    before = digests(out)
    what = "is the output of another plan" if complete else "was begun with another plan"
    with pytest.raises(MlaToolsError, match=f"(?s){what}.*{text}"):
        execute(planned(source, **options), out, resume=True)
    assert digests(out) == before


def test_another_source_and_another_version_are_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    begun(planned(copy), out)
    before = digests(out)
    # The same tensors in the same place, but for the spaces at the end of the header.
    shard = copy / "model-00001-of-00002.safetensors"
    data, times = shard.read_bytes(), shard.stat()
    length = int.from_bytes(data[:8], "little")
    shard.write_bytes(
        (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    )
    with pytest.raises(MlaToolsError) as caught:
        execute(planned(copy), out, resume=True)
    lines = str(caught.value).splitlines()
    place = f"  source.files.{shard.name}"
    assert lines[0] == f"{out} was begun with another plan, so it cannot be resumed:"
    assert lines[1] == f"{place}.bytes: was {len(data)}, is {len(data) + 8}"
    assert lines[2].startswith(f"{place}.header_sha256: was '")
    assert lines[3:] == ["  Start again with --overwrite, or use the original source and options."]
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "99.0")
        with pytest.raises(MlaToolsError, match=r"tools\.mlx: was '[0-9.]+', is '99\.0'"):
            execute(planned(copy), out, resume=True)
    assert digests(out) == before
    assert execute(planned(copy), out, resume=True)


def rewritten(path: Path) -> None:
    """Change one bit of the data, of which neither the size nor the header tells."""
    # In place: a file that is written anew is empty for a moment, and somebody may be reading it.
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def replaced(path: Path) -> None:
    """Put another file of the same size, header and time in the place."""
    data, times = path.read_bytes(), path.stat()
    path.rename(path.with_name("old"))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, replaced], ids=lambda change: change.__name__)
@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_source_that_changed_between_two_runs_is_named(
    shard: str, change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    begun(planned(copy), out)
    before = digests(out)
    change(copy / shard)
    (copy / "old").unlink(missing_ok=True)
    with pytest.raises(MlaToolsError) as caught:
        execute(planned(copy), out, resume=True)
    first, *lines, last = str(caught.value).splitlines()
    assert first.startswith(f"{out} was begun with another source, so it cannot be resumed")
    (line,) = lines
    assert line.startswith(f"  {shard}: was 'inode ")
    assert last == "  Start again with --overwrite, or use the original source and options."
    assert digests(out) == before
    execute(planned(copy), out, overwrite=True)
    fresh = tmp_path / "fresh"
    execute(planned(copy), fresh)
    assert digests(out) == digests(fresh)


def test_another_machine_may_read_a_copy_of_the_source(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    begun(planned(source), out)
    shutil.copytree(source, copy)
    with pytest.raises(MlaToolsError, match="was begun with another source"):
        execute(planned(copy), out, resume=True)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert execute(planned(copy), out, resume=True)
    assert digests(out) == wanted


@pytest.mark.parametrize("change", [rewritten, replaced], ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_source_that_changes_under_a_conversion_is_named(
    when: str, change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    plan = planned(copy)
    shard = copy / "model-00001-of-00002.safetensors"
    seen: list[int] = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        now = {"while": len(seen) == 4, "after": sum(seen) == plan.nbytes}
        if now.get(when):
            change(shard)

    if when == "before":
        change(shard)
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out, workload=Workload(1, 4000, 10**9), progress=progress)
    assert f"{shard.name}: was changed or replaced after the conversion was planned" in str(caught.value)
    assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]


def test_a_companion_that_changes_under_a_conversion_is_named(source: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    plan = planned(copy)
    rewritten(copy / "tokenizer.json")
    with pytest.raises(MlaToolsError, match=r"tokenizer\.json: was changed or replaced after"):
        execute(plan, out)
    assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_folder_that_another_process_writes_is_left_to_it(
    flag: str, source: Path, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    journal = begun(plan, out)
    before = digests(out)
    other = """
import fcntl, sys
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", other, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        assert main(["convert", str(source), "--mlx-path", str(out), flag]) == 1
        process.communicate()
    assert capsys.readouterr().err == f"error: {out} is being written by another process\n"
    assert digests(out) == before


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(
    plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = []

    def second(nbytes: int) -> None:
        with pytest.raises(MlaToolsError) as caught:
            execute(plan, out, resume=True)
        said.append(str(caught.value))

    execute(plan, out, progress=second)
    assert set(said) == {f"{out} is being written by another process"}
    assert digests(out) == wanted


# --- resume and overwrite ----------------------------------------------------------------------------


def test_a_complete_folder_has_nothing_left_to_do(
    source: Path, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    execute(plan, out)
    before = {path: path.stat() for path in [out, *out.iterdir()]}
    assert not execute(plan, out, resume=True)
    assert main(["convert", str(source), "--mlx-path", str(out), "--resume"]) == 0
    assert (
        capsys.readouterr().out == f"{out} is complete already; mla-sanitize verify {out} checks its bytes\n"
    )
    assert {path: path.stat() for path in before}.keys() == before.keys()
    assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in before.items())


@pytest.mark.parametrize("damage", ["gone", "shorter"])
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json", INDEX])
def test_a_complete_folder_that_was_damaged_is_not_called_complete(
    name: str, damage: str, plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    execute(plan, out)
    if damage == "gone":
        (out / name).unlink()
    else:
        os.truncate(out / name, 10)
    before = digests(out)
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out, resume=True)
    assert (
        str(caught.value) == f"{out} has changed since it was written; start again with --overwrite: {name}"
    )
    assert digests(out) == before
    execute(plan, out, overwrite=True)
    assert digests(out) == wanted


@pytest.mark.parametrize("damage", ["gone", "shorter", "another"])
@pytest.mark.parametrize("share", [0.5, 2], ids=["begun", "sealed"])
def test_a_damaged_temporary_file_is_reported(
    share: float, damage: str, plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if share < 1:
        journal = begun(plan, out)
        lines = lines_of(journal)
        sealed = [line["file"] for line in lines if "file" in line]
        (partial,) = [path for path in out.glob("*.safetensors.partial") if path.stem not in sealed][:1]
    else:
        with pytest.raises(StopError):
            execute(plan, out, agrees=lambda: _stop(0))
        partial = out / "model-00002-of-00003.safetensors.partial"
    if damage == "gone":
        partial.unlink()
    elif damage == "shorter":
        os.truncate(partial, partial.stat().st_size - 1)
    else:
        partial.write_bytes(bytes(partial.stat().st_size))
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out, resume=True)
    assert str(caught.value) == f"{partial} has changed since it was written; start again with --overwrite"
    execute(plan, out, overwrite=True)
    assert digests(out) == wanted


@pytest.mark.parametrize("state", ["complete", "unfinished", "empty"])
def test_overwrite_replaces_what_this_tool_made(
    state: str, source: Path, plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if state == "complete":
        execute(planned(source, quantize=QuantSpec()), out)
    elif state == "unfinished":
        begun(planned(source, dtype=DType.F32), out)
    else:
        out.mkdir()
    execute(plan, out, overwrite=True)
    assert digests(out) == wanted


@pytest.mark.parametrize("strange", ["mine.txt", "adapters/", "model-00001-of-00009.safetensors", ".hidden"])
@pytest.mark.parametrize("state", ["complete", "unfinished"])
def test_overwrite_leaves_a_folder_alone_in_which_there_is_anything_else(
    state: str, strange: str, plan: Plan, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if state == "complete":
        execute(plan, out)
    else:
        begun(plan, out)
    path = out / strange
    path.mkdir() if strange.endswith("/") else path.write_text("mine")
    before = {path: path.is_dir() or path.read_bytes() for path in out.iterdir()}
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out, overwrite=True)
    said = f"holds files that this tool did not make, so nothing was changed: {path.name}. Move them away"
    assert str(caught.value).startswith(f"{out} {said}")
    assert {path: path.is_dir() or path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "record", [None, "", "no JSON", "[]", "{}", '{"output": 5, "files": {}}'], ids=["none", "empty", *"abcd"]
)
@pytest.mark.parametrize(
    "flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"]
)
def test_a_model_that_this_tool_did_not_make_is_left_alone(
    flags: dict[str, bool], record: str | None, plan: Plan, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", INDEX):
        (out / name).write_text("mine")
    if record is not None:
        (out / RECORD).write_text(record)
    before = digests(out)
    with pytest.raises(MlaToolsError, match=r"as it already exists\. It is not an output of this tool"):
        execute(plan, out, **flags)
    assert digests(out) == before


@pytest.mark.parametrize("way", ["itself", "link to it", "its files are links"])
def test_the_source_is_never_the_output(way: str, source: Path, tmp_path: Path) -> None:
    # The source is itself an output of this tool, or it could not be replaced at all.
    first = tmp_path / "first"
    execute(planned(source), first)
    place = out = first
    if way == "link to it":
        out = tmp_path / "link"
        out.symlink_to(first)
    elif way == "its files are links":
        place = tmp_path / "links"
        place.mkdir()
        for path in first.iterdir():
            (place / path.name).symlink_to(path)
    before = digests(first)
    with pytest.raises(MlaToolsError, match="is the source itself; choose another folder for the output"):
        execute(planned(place, quantize=QuantSpec()), out, overwrite=True)
    assert digests(first) == before


# --- the disk ----------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def test_the_disk_is_asked_before_anything_is_made(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    needed = sum(file.layout.size for file in plan.files) + output_folder.SMALL_FILES
    needed += sum(companion.size for companion in plan.copied)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out)
    assert str(caught.value) == (
        f"the disk of {out} has {needed - 1:,} bytes free, but {needed:,} are needed;"
        " free some space or choose another disk"
    )
    assert list(tmp_path.iterdir()) == []
    with_free(monkeypatch, needed)
    execute(plan, out)


def test_what_is_there_already_needs_no_room(
    plan: Plan, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "SMALL_FILES", 0)
    out = tmp_path / "out"
    begun(plan, out)
    with_free(monkeypatch, plan.nbytes)
    execute(plan, out, resume=True)
    assert digests(out) == wanted
    # A complete folder gives way to the one that replaces it, and is kept if that is not enough.
    taken = sum(path.stat().st_blocks * 512 for path in out.iterdir())
    needed = sum(file.layout.size for file in plan.files)
    needed += sum(companion.size for companion in plan.copied)
    monkeypatch.setattr(output_folder, "SMALL_FILES", taken - needed + 1)
    with_free(monkeypatch, 0)
    with pytest.raises(MlaToolsError, match=f"has {taken:,} bytes free, but {taken + 1:,} are needed"):
        execute(plan, out, overwrite=True)
    assert digests(out) == wanted
    with_free(monkeypatch, 1)
    execute(plan, out, overwrite=True)
    assert digests(out) == wanted


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Callable[[], None]]:
    """Put a full disk behind a folder, and yield what makes room on it.

    A tmpfs with a file that fills it; where nothing may be mounted, a limit on how large a file becomes.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        ballast = folder / "ballast"
        try:
            size = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            ballast.write_bytes(bytes(size - 300_000))
            yield ballast.unlink
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_becomes_full_is_a_sentence_and_once_there_is_room_it_goes_on(
    source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "disk" / "out"
    argv = ["convert", str(source), "--mlx-path", str(out)]
    # What is free is not asked: it becomes less after the first byte.
    full = CHILD.replace(
        "import sys\n",
        "import shutil, sys\nshutil.disk_usage = lambda path: type('Usage', (), {'free': 1 << 50})\n",
        1,
    )
    with small_disk(tmp_path / "disk", 4 << 20) as make_room:
        ended = subprocess.run(child(*argv, code=full), capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stdout == ""
        error, advice = ended.stderr.splitlines()
        assert error.startswith(f"error: {out}")
        assert any(os.strerror(number) in error for number in (errno.ENOSPC, errno.EFBIG))
        assert advice == f"{out} is unfinished: run the same command with --resume to finish it"
        assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]
        make_room()
        subprocess.run(child(*argv, "--resume", code=full), check=True, capture_output=True)
        assert digests(out) == wanted


# --- the end of a process, at any moment ---------------------------------------------------------------


def is_there_a_way_on(out: Path) -> bool:
    """Return whether a folder is not yet there, or visibly unfinished, or complete with all its files."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if INDEX in names:
        files = set(json.loads((out / INDEX).read_text())["weight_map"].values())
        return files | {RECORD, "config.json"} <= names
    return not names or bool([*out.glob(JOURNALS)])


class Faults:
    """Ends the conversion at the n-th call that changes names or sizes or says that bytes are on disk, and
    at every later one.

    What is written into a temporary file from one of these calls to the next makes no other state.
    """

    CALLS = (
        (os, ("write", "ftruncate", "fsync", "rename", "unlink")),
        (Path, ("mkdir",)),
    )

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls, self.names = at, 0, set[str]()
        for owner, names in self.CALLS:
            for name in names:
                patch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls > self.at:
                raise StopError
            self.names.add(name)
            return call(*args, **kwargs)

        return counted


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}], ids=["new", "overwrite"])
def test_it_goes_on_from_every_call_that_changes_the_disk(
    flags: dict[str, bool],
    source: Path,
    wanted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output_writing, "CHECKPOINT_BYTES", 200_000)
    old = tmp_path / "old"
    if flags:
        execute(planned(source, quantize=QuantSpec()), old)
    out, at, plan = tmp_path / "out", 0, planned(source)
    while True:
        if flags:
            shutil.copytree(old, out)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at)
            try:
                execute(plan, out, workload=Workload(1, 1 << 20, 10**9), **flags)
            except StopError:
                pass
            else:
                break
        untouched = flags and digests(out).items() >= digests(old).items()
        assert untouched or is_there_a_way_on(out), at
        execute(plan, out, **(flags if untouched else {"resume": True}))
        assert digests(out) == wanted, at
        shutil.rmtree(out)
        at += 1
        if flags and "ftruncate" in faults.names:
            return  # the old folder is gone, and all that comes now is what comes to a new one
    assert not flags
    assert faults.calls == at > 40
    assert digests(out) == wanted


# Tells of each call that changes the disk just before it is made.
TALKING = """
import os, pathlib, sys
def logged(call):
    def telling(*args, **kwargs):
        if args[0] != PIPE:
            write(PIPE, b".")
        return call(*args, **kwargs)
    return telling
PIPE, write = int(sys.argv.pop(1)), os.write
for owner, names in ((os, "write pwrite ftruncate fsync rename unlink"), (pathlib.Path, "mkdir")):
    for name in names.split():
        setattr(owner, name, logged(getattr(owner, name)))
"""


def kill_after(calls: int, *argv: str) -> tuple[int, int]:
    """Run the command, kill it when it has come to so many calls; return its exit code and the calls."""
    reading, writing = os.pipe()
    code = TALKING + CHILD
    with subprocess.Popen(
        child(str(writing), *argv, code=code),
        pass_fds=[writing],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(writing)
        seen = 0
        while seen < calls and (found := os.read(reading, calls - seen)):
            seen += len(found)
        if seen == calls:
            process.kill()
        os.close(reading)
        _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode, seen


@pytest.mark.parametrize("most", [8, pytest.param(16, marks=ONLY_IN_ALL)])
def test_it_goes_on_after_being_killed_at_any_moment(
    most: int, source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    argv = ["convert", str(source), "--max-memory", "10GB", "--threads", "2", "--mlx-path"]
    code, calls = kill_after(1 << 30, *argv, str(tmp_path / "at once"))
    assert code == 0
    assert calls > 60
    assert digests(tmp_path / "at once") == wanted

    def lane(number: int) -> int:
        """Kill conversions, each until it is complete; return how often."""
        chance, kills, folders = random.Random(number), 0, 0
        while kills < most:
            out = tmp_path / f"out {number} {folders}"
            while kill_after(chance.randrange(1, calls // 2), *argv, str(out), "--resume")[0]:
                kills += 1
                assert is_there_a_way_on(out)
            assert digests(out) == wanted
            folders += 1
        return kills

    with ThreadPoolExecutor(2) as lanes:
        assert sum(lanes.map(lane, range(2))) >= 2 * most


SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
def test_a_request_to_end_is_followed_and_it_says_how_to_go_on(
    number: int, source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    # The first progress after the first tensor waits for the signal.
    waiting = CHILD.replace(
        "sys.exit(",
        """
import contextlib, os, signal
from mla_tools import cli
woken, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)  # a signal that comes just before the wait ends it too
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored
signal.signal(signal.SIGTERM, signal.SIG_DFL)
@contextlib.contextmanager
def telling():
    def show(progress):
        if progress.done:
            print("written", flush=True)
            os.read(woken, 1)
    yield show
cli.telling = telling
sys.exit(""",
    )
    out = tmp_path / "out"
    argv = ["convert", str(source), "--mlx-path", str(out)]
    with subprocess.Popen(
        child(*argv, code=waiting), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said == f"interrupted; {out} is unfinished: run the same command with --resume to finish it\n"
    assert not [path for path in out.iterdir() if path.suffix in (".safetensors", ".json")]
    with Directory(out) as folder:
        assert not is_complete(folder, provenance(planned(source), "cpu"))
    assert execute(planned(source), out, resume=True)
    assert digests(out) == wanted


# --- the record ----------------------------------------------------------------------------------------


def test_the_record_tells_what_was_made_from_what(source: Path, tmp_path: Path) -> None:
    made, out = planned(source, quantize=QuantSpec()), tmp_path / "out"
    execute(made, out)
    record = json.loads((out / RECORD).read_text())
    others = {path.name: path for path in out.iterdir() if path.name != RECORD}
    assert record["files"] == {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in others.items()
    }
    assert record["device"] == "cpu"
    assert record["tools"] == {"mla-tools": version("mla-tools"), "mlx": version("mlx")}
    assert record["options"]["quantize"] == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert (record["source"]["name"], record["source"]["revision"]) == ("tiny", "")
    shards = {}
    for path in source.glob("*.safetensors"):
        data = path.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        digest = hashlib.sha256(header).hexdigest()
        shards[path.name] = {"bytes": len(data), "header_sha256": digest, "hub_hash": ""}
    assert record["source"]["files"] == shards
    dropped = {name: reason for reason, names in record["dropped"].items() for name in names}
    assert dropped == {name: drop.reason for drop in made.drops for name in drop.source.parts.values()}
    assert dropped
    used = {name for step in made.steps for s in step.sources for name in s.parts.values()}
    assert used | dropped.keys() == made.checkpoint.tensors.keys()
    assert record["notes"] == list(made.notes)
    assert "/" not in (out / RECORD).read_text()


@pytest.mark.parametrize("way", ["threads", "slabs", "resumed", "elsewhere"])
def test_the_record_does_not_depend_on_how_and_where(
    way: str, source: Path, plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "another name"
    if way == "threads":
        execute(plan, out, workload=Workload(7, 1 << 20, 10**9))
    elif way == "slabs":
        execute(plan, out, workload=Workload(2, 1000, 10**9))
    elif way == "resumed":
        begun(plan, out)
        execute(plan, out, resume=True)
    else:
        copy = tmp_path / "deep" / source.name
        shutil.copytree(source, copy)
        execute(planned(copy), out)
    assert digests(out) == wanted


def test_a_folder_of_the_hubs_cache_is_named_as_the_repository_and_its_commit(
    source: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models--org--name" / "snapshots" / "abc123"
    shutil.copytree(source, place)
    source = provenance(planned(place), "cpu")["source"]
    assert (source["name"], source["revision"]) == ("hf://org/name", "abc123")


# --- what is said at the end -----------------------------------------------------------------------------


def test_the_source_is_named_as_what_it_is_before_anything_else(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    for out in (source, tmp_path / "link", source / ".." / source.name):
        for flags in ([], ["--overwrite"], ["--resume"]):
            assert main(["convert", str(source), "--mlx-path", str(out), *flags]) == 1
            said = capsys.readouterr().err
            assert said.endswith(" is the source itself; choose another folder for the output\n")
    assert digests(source) == before


def test_an_output_that_would_fail_again_is_not_advised_to_be_resumed(plan: Plan, tmp_path: Path) -> None:
    def fail(number: type[MlaToolsError]) -> Callable[[], None]:
        def failing() -> None:
            raise number("what it is")

        return failing

    notes = {
        MlaToolsError: "run the same command with --resume to finish it",
        DataError: "--resume would fail again: start again with --overwrite",
        DamagedError: "",
    }
    for kind, note in notes.items():
        out = tmp_path / kind.__name__
        with pytest.raises(kind) as caught:
            execute(plan, out, agrees=fail(kind))
        said = "".join(getattr(caught.value, "__notes__", ()))
        assert said.endswith(note)
        assert bool(said) == bool(note)
    with pytest.raises(MlaToolsError) as caught:
        execute(plan, out, overwrite=True, agrees=fail(MlaToolsError))
    assert caught.value.__notes__ == [
        f"{out} is unfinished: run the same command with --resume instead of --overwrite to finish it"
    ]


def test_an_unfinished_output_says_what_it_is_when_it_is_taken_for_a_checkpoint(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    begun(plan, out)
    assert main(["inspect", str(out)]) == 1
    said = capsys.readouterr().err
    assert "This is an unfinished output of mla-sanitize: convert --resume finishes it." in said


def test_an_output_that_moves_while_it_is_written_is_not_completed(
    plan: Plan, wanted: dict[str, str], tmp_path: Path
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"

    def move() -> None:
        out.rename(away)
        out.mkdir()

    with pytest.raises(MlaToolsError, match="was moved or replaced while it was written; put it back"):
        execute(plan, out, agrees=move)
    assert list(out.iterdir()) == []
    assert not [path for path in away.iterdir() if path.suffix in (".safetensors", ".json")]
    out.rmdir()
    away.rename(out)
    assert execute(plan, out, resume=True)
    assert digests(out) == wanted


def test_a_name_that_the_disk_cannot_hold_is_refused_at_first(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "longest_name", lambda path: 30)
    with pytest.raises(MlaToolsError, match=r"allows names of up to 30 bytes.*; too long: model-00001"):
        execute(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checked", [False, True])
def test_the_record_says_whether_the_source_was_checked(checked: bool, source: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, copy)
    notes = copy / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    hashes = {name: digest for name, digest in digests(source).items() if name.endswith(".safetensors")}
    for name, digest in hashes.items():
        (notes / f"{name}.metadata").write_text(f"{'c' * 40}\n{digest}\n1.0\n")
    plan = planned(copy)
    if checked:
        check_source(plan)
    execute(plan, out, source_checked=checked)
    record = json.loads((out / RECORD).read_text())
    assert record["source_checked"] is checked
    assert {name: file["hub_hash"] for name, file in record["source"]["files"].items()} == hashes
    assert len(hashes) == 2


def test_a_run_that_ended_at_its_very_end_is_compared_before_its_journal_goes(
    plan: Plan, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("mla_tools.output.publishing.end_journals", lambda folder: None)
        execute(plan, out)
    (journal,) = out.glob(JOURNALS)
    for name in wanted:
        again = Path(shutil.copytree(out, tmp_path / name))
        data = bytearray((again / name).read_bytes())
        data[-2] ^= 1
        (again / name).write_bytes(data)
        with pytest.raises(MlaToolsError):
            execute(plan, again, resume=True)
        assert (again / journal.name).exists()
    assert not execute(plan, out, resume=True)
    assert digests(out) == wanted


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_a_small_file_of_a_complete_folder_is_compared(name: str, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(plan, out)
    data = bytearray((out / name).read_bytes())
    data[-3] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(
        MlaToolsError, match=f"has changed since it was written; start again with --overwrite: {name}"
    ):
        execute(plan, out, resume=True)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", "tokenizer.json"])
def test_a_name_that_a_run_had_not_come_to_is_not_its_file(name: str, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(plan, out)
    (out / name).write_text("mine")
    with pytest.raises(
        MlaToolsError, match=f"holds files that this tool did not make, so nothing was changed: {name}"
    ):
        execute(plan, out, overwrite=True)
    assert (out / name).read_text() == "mine"
    # The weights are all there, but the file has its temporary name yet.
    last = tmp_path / "last"
    with pytest.raises(StopError):
        execute(plan, last, agrees=lambda: _stop(0))
    (last / f"{name}.partial").touch()
    (last / name).write_text("mine")
    with pytest.raises(MlaToolsError, match="holds files that this tool did not make"):
        execute(plan, last, overwrite=True)
    assert (last / name).read_text() == "mine"


def test_a_path_through_a_folder_that_is_not_there_is_where_it_leads(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "not" / ".." / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
