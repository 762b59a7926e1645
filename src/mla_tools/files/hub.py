"""Checkpoints that are not folders yet: repositories on the Hugging Face hub, read in place or downloaded."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError, clipped
from mla_tools.files.companions import OTHER_WEIGHTS
from mla_tools.files.network import Arrival, Client, Clock, Sleep, passing, plain
from mla_tools.files.parsing import parse_object
from mla_tools.files.place import (
    Bytes,
    File,
    Folder,
    Kind,
    OpenFile,
    Part,
    Place,
    check_range,
    leaf_of,
    shown,
)
from mla_tools.files.ranges import Ranges, refusal
from mla_tools.files.settings import checked_endpoint, constants, hub_headers, one_line, session

__all__ = ["Repository", "locate", "open_repository"]

# What a conversion does not read, in the patterns of a download: what folders hold is no part of the model.
_NOT_READ = (*OTHER_WEIGHTS, "*/*.safetensors")

_SCHEME = "hf://"
_URL = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(.+))?")
_COMMIT = re.compile("[0-9a-f]{40}")

# A listing comes from outside: what could be a path, is hidden or cannot be printed is no file of ours.
_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f-\x9f\ud800-\udfff][^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]*")

_MAX_NAME = 255  # bytes, as in a folder
_SHA256 = re.compile("[0-9a-f]{64}")

_LISTING_TRIES = 4
_LISTING_SECONDS = 300.0
_MAX_LISTING = 16 << 20  # a file takes a quarter of a kilobyte of it, and JSON more memory than bytes
_MAX_FILES = 10_000
_MAX_PROBLEMS = 1000

# What follows a range is mostly wanted next: the header after its length (71 kB each in DeepSeek-V3.2), the
# scales after a weight. A request costs more than these bytes.
_AHEAD = 1 << 17
_KEPT = 64

_READERS = 16


def locate(source: str, revision: str | None = None, *, download: bool = False) -> Place:
    """Return where a checkpoint lies: a folder, or the repository hf://org/name@revision or org/name.

    With `download`, and when the hub is offline, a repository is first brought into the hub's cache.
    Raises MlaToolsError if it is neither a folder nor a repository that can be had, UsageError for two
    revisions, and for a revision or a download of a folder.
    """
    if source.startswith(_SCHEME):
        match = _URL.fullmatch(source)
        if not match:
            raise MlaToolsError(f"{shown(source)}: write a repository as hf://org/name@revision")
        name, own = match.groups()
        if own and revision and own != revision:
            raise UsageError(f"{shown(source)} names another revision than --revision {shown(revision)}.")
        revision = own or revision
        no_folder = f"{shown(source)}: "
    else:
        try:
            path = Path(source).expanduser()
            if path.exists():
                return _folder(path, revision, download)
        except (OSError, RuntimeError, ValueError) as error:
            raise MlaToolsError(f"{shown(source)}: no such folder ({one_line(error)})") from error
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise MlaToolsError(
                f"{shown(source)}: no such folder, and not a repository name such as org/model"
            )
        name = source
        no_folder = f"{shown(source)}: no such folder, and "
    offline = constants().HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

    try:
        if download or offline:
            return Folder(_downloaded(name, revision))
        return open_repository(name, revision)
    except HFValidationError as error:
        raise MlaToolsError(f"{no_folder}not a repository name: {one_line(error)}") from error
    except CheckpointError:
        raise
    except MlaToolsError as error:
        raise MlaToolsError(f"{no_folder}{error}") from error


def _folder(path: Path, revision: str | None, download: bool) -> Folder:
    given = [word for word, is_given in (("--revision", revision), ("--download", download)) if is_given]
    if given:
        words = f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'}"
        raise UsageError(f"{shown(str(path))} is a folder here; {words} for repositories on the hub.")
    return Folder(path)


def _downloaded(name: str, revision: str | None) -> Path:
    """Return the folder of a repository in the hub's cache, complete as far as a conversion needs it."""
    from huggingface_hub.errors import HFValidationError

    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_NOT_READ)))
    except HFValidationError:
        raise
    except Exception as error:  # what goes wrong in a library that reads settings, files and answers
        checked_endpoint(constants().ENDPOINT)  # it may be one of the settings, which these name
        hub_headers()
        session()
        raise MlaToolsError(f"the repository cannot be downloaded: {one_line(error)}") from error


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the hub says about a file: its size, and the hash of its content, or nothing."""

    size: int
    tag: str


def open_repository(
    name: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    sleep: Sleep | None = None,
    clock: Clock = time.monotonic,
) -> Repository:
    """Return a repository at the commit that a revision (default: the default branch) names now.

    `endpoint` is another hub than HF_ENDPOINT names. Raises MlaToolsError if the hub does not give it,
    CheckpointError for a listing that is none, and HFValidationError for a name that none can have.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    endpoint = checked_endpoint(endpoint or constants().ENDPOINT)
    validate_repo_id(name)
    client = Client(name, hub_headers(), sleep, clock)
    path = f"/revision/{quote(revision, safe='', errors='replace')}" if revision else ""
    url = f"{endpoint}/api/models/{quote(name)}{path}?blobs=true"
    data = client.persist(
        lambda: client.watched(partial(_listing, client, name, revision, url)), name, _LISTING_TRIES
    )
    try:
        info, twice = parse_object(data)
    except ValueError as error:
        raise CheckpointError([_no_listing(name, f"it {error}")]) from error
    if twice:
        raise CheckpointError([_no_listing(name, f"a duplicate key: {shown(twice[0])}")])
    commit, siblings = info.get("sha"), info.get("siblings")
    if type(commit) is not str or not _COMMIT.fullmatch(commit):
        found = shown(commit) if type(commit) is str else clipped(commit)
        raise CheckpointError([_no_listing(name, f"commit {found}")])
    if type(siblings) is not list or not all(type(sibling) is dict for sibling in siblings):
        raise CheckpointError([_no_listing(name, f"files {clipped(siblings)}")])
    listed = _listed(name, siblings)
    others = _unlisted(siblings, listed)
    return Repository(name, commit, listed, others, Ranges(name, commit, client), endpoint)


def _listing(client: Client, name: str, revision: str | None, url: str, arrival: Arrival) -> bytes:
    """Return the hub's answer about a repository, as it came."""
    data = bytearray()
    with client.follow(name, url, {}) as (_, response):
        status, headers = response.status_code, response.headers
        if status != 200:
            raise passing(status, headers) or refusal(status, headers, name, revision)
        plain(name, response)
        arrival.begin(_LISTING_SECONDS)
        for piece in response.iter_raw():
            if len(data) + len(piece) > _MAX_LISTING:
                raise CheckpointError([_no_listing(name, f"more than {_MAX_LISTING:,} bytes")])
            arrival.take(piece, data.extend)
    return bytes(data)


def _listed(repository: str, siblings: list[dict[str, Any]]) -> dict[str, _Listed]:
    """Return the files of a listing that a folder would show: no other paths, nothing hidden."""
    listed: dict[str, _Listed] = {}
    problems = []
    for sibling in siblings:
        name, size = sibling.get("rfilename"), sibling.get("size")
        leaf = leaf_of(name) if type(name) is str else ""
        if type(name) is not str or not _PLAIN.fullmatch(leaf) or len(leaf.encode()) > _MAX_NAME:
            continue
        if name in listed:
            problems.append(Problem(shown(name), f"is a duplicate in {repository}"))
        elif len(listed) == _MAX_FILES:
            problems.append(Problem(repository, f"has more than {_MAX_FILES:,} files"))
        elif type(size) is not int or not 0 <= size < 1 << 62:
            problems.append(Problem(shown(name), f"is listed in {repository} without its size"))
        else:
            listed[name] = _Listed(size, _tag(sibling))
        if len(problems) == _MAX_PROBLEMS:
            break
    if problems:
        raise CheckpointError(problems)
    return listed


def _unlisted(siblings: list[dict[str, Any]], listed: Mapping[str, _Listed]) -> list[str]:
    """Return what else a listing has: the folders ("code/"), hidden files, and names of no file here."""
    names = (sibling.get("rfilename") for sibling in siblings)
    parts = (name.partition("/") for name in names if type(name) is str and name and name not in listed)
    return sorted({first + slash for first, slash, _ in parts})


def _tag(sibling: dict[str, Any]) -> str:
    """Return the hash of a file's content as git LFS or git names it, or nothing if none is listed."""
    lfs = sibling.get("lfs")
    if lfs is not None:  # the blob is a pointer then, whose hash says nothing of the content's bytes
        tag, form = lfs.get("sha256") if type(lfs) is dict else None, _SHA256
    else:
        tag, form = sibling.get("blobId"), _COMMIT
    return tag if type(tag) is str and form.fullmatch(tag) else ""


def _no_listing(name: str, found: str) -> Problem:
    cause = "Check HF_ENDPOINT, if it is set."
    return Problem(name, "the hub's answer is not a listing of a repository", found=found, cause=cause)


class Repository:
    """The files at the top of a repository, at one commit; nothing of them is kept on disk."""

    def __init__(
        self,
        name: str,
        commit: str,
        listed: Mapping[str, _Listed],
        others: Sequence[str],
        ranges: Ranges,
        endpoint: str,
    ) -> None:
        self.name, self.revision = name, commit
        self._others = others
        self._listed, self._ranges, self._endpoint = listed, ranges, endpoint
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def __str__(self) -> str:
        return f"{_SCHEME}{self.name}@{self.revision}"

    @property
    def local(self) -> bool:
        return False

    @property
    def readers(self) -> int:
        return _READERS

    def names(self) -> list[str]:
        return sorted(self._listed)

    def others(self) -> list[str]:
        return list(self._others)

    def kind(self, name: str) -> Kind:
        return "file"

    def file(self, name: str) -> File:
        return _RepositoryFile(self, name)

    def tag(self, name: str) -> str:
        return self._listed[name].tag

    def stop(self) -> None:
        self._ranges.stop()

    def size(self, name: str) -> int:
        return self._listed[name].size

    def read(self, name: str, offset: int, nbytes: int) -> Bytes:
        """Return a range of a file, in at most one request."""
        from huggingface_hub import hf_hub_url

        size = self.size(name)
        check_range(name, offset, nbytes, size)
        ahead = min(_AHEAD, size - offset - nbytes)
        data = memoryview(bytearray(nbytes + ahead))
        done = self._recall(name, offset, data[:nbytes])
        if done < nbytes:
            url = hf_hub_url(self.name, name, revision=self.revision, endpoint=self._endpoint)
            self._ranges.fill(name, url, offset + done, data[done:], size)
            first = done if nbytes <= _AHEAD else nbytes
            self._keep(name, offset + first, data[first:])
        return data[:nbytes]

    def _recall(self, name: str, offset: int, data: Bytes) -> int:
        """Copy what is kept of a range to its place, and return how many bytes from its start that is."""
        with self._lock:
            for key, kept in self._kept.items():
                start = offset - key[1]
                if key[0] == name and 0 <= start < len(kept):
                    self._kept.move_to_end(key)
                    found = kept[start : start + len(data)]
                    data[: len(found)] = found
                    return len(found)
        return 0

    def _keep(self, name: str, offset: int, data: Bytes) -> None:
        with self._lock:
            self._kept[name, offset] = bytes(data)  # a view would keep all of what was read
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _RepositoryFile:
    """A file of a repository; it is always open, because nothing is held for it."""

    repository: Repository
    name: str

    @property
    def size(self) -> int:
        return self.repository.size(self.name)

    @property
    def stamp(self) -> str:
        return ""

    def pin(self, part: Part | None = None) -> File:
        return self  # of one commit, which never changes

    def open(self) -> OpenFile:
        return self

    def read(self, offset: int, nbytes: int, into: Bytes | None = None) -> Bytes:
        data = self.repository.read(self.name, offset, nbytes)
        if into is None:
            return data
        into[:] = data
        return into

    def close(self) -> None:
        pass
