"""A folder that is open: no link in it is followed, and no file of somebody else is touched."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mla_tools.errors import MlaToolsError
from mla_tools.files.directory import Directory, longest_name, partial_name
from mla_tools.files.place import identity_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Directory]:
    (tmp_path / "folder").mkdir()
    with Directory(tmp_path / "folder") as folder:
        yield folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file outside of the folder."""
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def linked(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def linked_to_nothing(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("nothing"))


def hard_linked(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def piped(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def made_a_folder(path: Path, victim: Path) -> None:
    path.mkdir()


def a_device(path: Path, victim: Path) -> None:
    path.symlink_to("/dev/zero")


WAYS: dict[str, Callable[[Directory], object]] = {
    "open": lambda folder: folder.open("name"),
    "write": lambda folder: folder.open("name", write=True),
    "append": lambda folder: folder.open("name", append=True),
    "read": lambda folder: folder.read("name", 100),
}

STRANGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "link": (linked, "is a link"),
    "link to nothing": (linked_to_nothing, "is a link"),
    "link to a device": (a_device, "is a link"),
    "hard link": (hard_linked, r"has another name too \(a hard link\)"),
    "pipe": (piped, "is not a regular file"),
    "folder": (made_a_folder, "is not a regular file"),
}


@pytest.mark.parametrize(("make", "text"), STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("way", WAYS)
def test_what_may_be_anybodys_is_refused(
    way: str, make: Callable[[Path, Path], None], text: str, folder: Directory, victim: Path
) -> None:
    make(folder.path / "name", victim)
    with pytest.raises(
        MlaToolsError, match=f"^{folder.path}/name {text}, and this tool writes no such files"
    ):
        WAYS[way](folder)
    assert (victim.read_text(), victim.stat().st_nlink > 1) == ("mine", make is hard_linked)
    assert not victim.with_name("nothing").exists()


@pytest.mark.parametrize(("make", "text"), STRANGE.values(), ids=STRANGE)
def test_a_new_file_takes_no_name_that_is_taken(
    make: Callable[[Path, Path], None], text: str, folder: Directory, victim: Path
) -> None:
    make(folder.path / "name", victim)
    for create in (lambda: folder.create("name"), lambda: folder.write("name", b"other")):
        with pytest.raises(FileExistsError):
            create()
    folder.write("old", b"other")
    with pytest.raises(MlaToolsError, match=f"{folder.path}/name exists already"):
        folder.rename("old", "name")
    assert victim.read_text() == "mine"
    assert folder.names() == ["name", "old"]


NO_NAMES = [
    *("", ".", "..", "a/b", "/etc/passwd", "../victim", "a\0b"),
    *(f"additional_chat_templates/{name}" for name in ("", ".", "..", "../victim", "a/b")),
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_never_leads_out(name: str, folder: Directory, victim: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: folder.open(name),
        lambda: folder.create(name),
        lambda: folder.read(name, 10),
        lambda: folder.status(name),
        lambda: folder.remove(name),
        lambda: folder.rename(name, "a"),
    ]
    for call in calls:
        with pytest.raises(MlaToolsError, match="is not the plain name of a file"):
            call()
    assert victim.read_text() == "mine"


def test_a_folder_is_the_same_wherever_its_path_leads_later(folder: Directory, tmp_path: Path) -> None:
    assert folder.is_path()
    folder.path.rename(tmp_path / "away")
    assert not folder.is_path()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.path.symlink_to(elsewhere)
    folder.write("name", b"data")
    assert not folder.is_path()
    assert (tmp_path / "away" / "name").read_bytes() == b"data"
    assert list(elsewhere.iterdir()) == []


def test_only_the_file_that_is_known_is_removed(folder: Directory) -> None:
    folder.write("name", b"first")
    known = identity_of((folder.path / "name").stat())
    (folder.path / "other").write_bytes(b"other")
    (folder.path / "other").rename(folder.path / "name")
    assert not folder.remove("name", known)
    assert folder.read("name", 10) == b"other"
    assert folder.remove("name", identity_of((folder.path / "name").stat()))
    assert folder.remove("name", known)  # it is gone
    assert folder.names() == []


def test_the_one_folder_of_files_that_are_ours_comes_and_goes_with_them(folder: Directory) -> None:
    first, second = (f"additional_chat_templates/{name}.jinja" for name in "ab")
    assert folder.read(first, 10) is None
    with pytest.raises(FileNotFoundError):
        folder.open(first)
    folder.write("top", b"")
    folder.write(partial_name(second), b"text")
    folder.rename(partial_name(second), second)
    folder.write(first, b"other")
    folder.sync()
    assert folder.names() == [first, second, "top"]
    assert (folder.path / second).read_text() == "text"
    assert folder.remove(second)
    assert (folder.path / "additional_chat_templates").is_dir()
    assert folder.remove(first)
    assert [path.name for path in folder.path.iterdir()] == ["top"]


@pytest.mark.parametrize("make", [linked, linked_to_nothing, piped], ids=lambda make: make.__name__)
def test_a_folder_of_somebody_else_is_not_written_to(
    make: Callable[[Path, Path], None], folder: Directory, victim: Path
) -> None:
    victim.unlink()
    victim.mkdir()
    (victim / "a.jinja").write_text("mine")
    make(folder.path / "additional_chat_templates", victim)
    name = "additional_chat_templates/a.jinja"
    calls: list[Callable[[], object]] = [
        lambda: folder.open(name, write=True),
        lambda: folder.write(name, b"other"),
        lambda: folder.remove(name),
        lambda: folder.read(name, 10),
    ]
    for call in calls:
        with pytest.raises(MlaToolsError, match=r"additional_chat_templates is (a link|not a folder)"):
            call()
    assert folder.names() == ["additional_chat_templates"]
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


def test_what_is_read_has_a_limit(folder: Directory) -> None:
    folder.write("name", b"12345")
    assert folder.read("name", 5) == b"12345"
    with pytest.raises(MlaToolsError, match=r"name is too large \(5 bytes, at most 4\)"):
        folder.read("name", 4)
    os.truncate(folder.path / "name", 20 << 30)
    with pytest.raises(MlaToolsError, match="is too large"):
        folder.read("name", 1 << 20)
    assert folder.read("nothing", 5) is None


def test_a_new_file_is_one_that_its_owner_may_write(folder: Directory) -> None:
    folder.write("name", b"")
    assert (folder.path / "name").stat().st_mode & stat.S_IWUSR


def test_a_folder_that_cannot_be_synced_is_one_of_a_network(
    folder: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Callable[[int], None]:
        def failing(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        return failing

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    folder.sync()
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        folder.sync()


def test_the_longest_name_is_that_of_the_disk_where_a_folder_will_be(tmp_path: Path) -> None:
    most = longest_name(tmp_path / "not" / "there")
    (tmp_path / ("a" * most)).touch()
    with pytest.raises(OSError, match="File name too long"):
        (tmp_path / ("a" * (most + 1))).touch()
    assert partial_name("a") == "a.partial"
