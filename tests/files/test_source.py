"""What lies beside the weights, a source that changes, and the hashes that the hub gives."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.hostile import SHARDS, folder_with_shards

from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.files.checkpoint import check_content, check_unchanged, open_checkpoint
from mla_tools.files.reader import Reader

ONE, TWO, THREE = SHARDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config, three shards of two layers each, and the index of them."""
    return folder_with_shards(tmp_path / "model")


# --- what lies beside the weights ----------------------------------------------------------------------


def test_a_companion_that_cannot_be_copied_is_a_note_while_planning(folder: Path) -> None:
    most = 255 - len(".partial")
    fits, long = "a" * (most - 5) + ".json", "a" * (most - 4) + ".json"
    for name in (fits, long, "Tokenizer.json", "tokenizer.json", "Config.json"):
        (folder / name).write_text("{}")
    os.mkfifo(folder / "pipe.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == ()
    assert [item.name for item in checkpoint.companions] == [fits, "tokenizer.json"]
    assert sorted(checkpoint.notes) == [
        "Config.json differs from config.json only in upper and lower case, not copied",
        "Tokenizer.json differs from tokenizer.json only in upper and lower case, not copied",
        f"{long} has a name of more than 247 bytes, not copied",
        "pipe.json is not a regular file, not copied",
    ]


def test_a_companion_that_cannot_be_read_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").write_text("{}")
    opened = os.open

    def refuse(path: Path, *args: int, **kwargs: int) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    (problem,) = open_checkpoint(folder).problems
    assert (problem.subject, problem.what, problem.found) == (
        "tokenizer.json",
        "cannot be read",
        "Permission denied",
    )


def test_a_companion_of_gigabytes_is_not_copied(folder: Path) -> None:
    (folder / "tokenizer.json").touch()
    os.truncate(folder / "tokenizer.json", (1 << 30) + 1)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.companions == ()
    assert checkpoint.notes == ("tokenizer.json is larger than 1,073,741,824 bytes, not copied",)


def test_a_companion_has_its_size(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{   }")
    assert [(item.name, item.size) for item in open_checkpoint(folder).companions] == [("tokenizer.json", 5)]


# --- a source that changes -----------------------------------------------------------------------------


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def touched(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    data, times = path.read_bytes(), path.stat()
    path.rename(path.with_name("kept"))
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def another_header(path: Path) -> None:
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data.replace(b"BF16", b"F16 ", 1).replace(b'"F16 "', b'"F16" '))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def longer(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {"rewritten": rewritten, "touched": touched, "replaced": replaced, "header": another_header,
           "longer": longer}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_planned_opens_only_while_it_is_the_same(
    change: Callable[[Path], None], folder: Path
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    check_unchanged(checkpoint)
    changed = [TWO] if change is another_header else [TWO, "tokenizer.json"]
    for name in changed:
        change(folder / name)
    with pytest.raises(CheckpointError) as caught:
        check_unchanged(checkpoint)
    assert [problem.subject for problem in caught.value.problems] == changed
    what = "was changed or replaced after the conversion was planned"
    assert {problem.what for problem in caught.value.problems} == {what}
    with Reader() as reader:
        stored = checkpoint.tensors["model.layers.2.weight"]
        with pytest.raises(CheckpointError, match=what):
            reader.read(stored.file, stored.offset, 1)
        other = checkpoint.tensors["model.layers.0.weight"]
        assert len(reader.read(other.file, other.offset, 1)) == 1


def test_what_is_gone_is_named(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / ONE).unlink()
    with pytest.raises(CheckpointError, match=f"{ONE}: is not there"):
        check_unchanged(checkpoint)


# --- the hub's hashes ----------------------------------------------------------------------------------


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_the_cache(folder: Path, digest: Callable[[bytes], str]) -> Path:
    """Make of a folder what the hub's cache has: links to blobs, each of which is called by its hash."""
    home = folder.parent / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        name = digest(path.read_bytes())
        path.rename(home / "blobs" / name)
        (home / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{name}")
    return home / "snapshots" / "abc"


def in_a_local_dir(folder: Path, digest: Callable[[bytes], str]) -> Path:
    """Add to a folder what `hf download --local-dir` notes."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            text = f"{'c' * 40}\n{digest(path.read_bytes())}\n1700000000.0\n"
            (notes / f"{path.name}.metadata").write_text(text)
    return folder


@pytest.mark.parametrize("digest", [sha256, blob_id], ids=["sha256", "git"])
@pytest.mark.parametrize("place", [in_the_cache, in_a_local_dir], ids=["cache", "local-dir"])
def test_the_hash_that_the_hub_gave_is_compared(
    place: Callable[..., Path], digest: Callable[[bytes], str], folder: Path
) -> None:
    home = place(folder, digest)
    checkpoint = open_checkpoint(home)
    assert [shard.tag for shard in checkpoint.shards] == [
        digest((home / f).read_bytes()) for f in (ONE, TWO, THREE)
    ]
    read: list[int] = []
    check_content(checkpoint, progress=read.append)
    assert sum(read) == sum(shard.size for shard in checkpoint.shards)
    data = (home / TWO).read_bytes()
    (home / TWO).resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        check_content(open_checkpoint(home))
    (problem,) = caught.value.problems
    assert (problem.subject, problem.what) == (TWO, "is not the hub's file")
    assert problem.needed == digest(data)


def test_each_rank_reads_its_part(folder: Path) -> None:
    checkpoint = open_checkpoint(in_a_local_dir(folder, sha256))
    read: list[int] = []
    for rank in range(2):
        check_content(checkpoint, (rank, 2), read.append)
    assert sum(read) == sum(shard.size for shard in checkpoint.shards)


@pytest.mark.parametrize(
    "note", [None, "", "a\nb\nc", "a\n" + "x" * 64, "a\n" + "0" * 64 + "0", "\xff", "0" * 5000]
)
def test_without_a_hash_there_is_nothing_to_compare_with(note: str | None, folder: Path) -> None:
    home = in_a_local_dir(folder, sha256)
    path = home / ".cache" / "huggingface" / "download" / f"{TWO}.metadata"
    path.unlink()
    if note is not None:
        path.write_text(note, encoding="latin-1")
    checkpoint = open_checkpoint(home)
    assert [bool(shard.tag) for shard in checkpoint.shards] == [True, False, True]
    with pytest.raises(MlaToolsError, match=f"the hub's hash is not known for {TWO}"):
        check_content(checkpoint)
