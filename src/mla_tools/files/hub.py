"""Checkpoints that are not folders yet: repositories on the Hugging Face hub, read in place or downloaded."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError
from mla_tools.files.place import Bytes, File, Folder, Kind, OpenFile, Part, Place, check_range, shown
from mla_tools.files.ranges import PassingError, Ranges, Sleep, passing, persist, refusal

__all__ = ["Repository", "locate", "open_repository"]

# What a conversion reads: the weights and the small files beside them. Never pickles, never images.
_PATTERNS = ("*.safetensors", "*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")

_SCHEME = "hf://"
_URL = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(.+))?")
_COMMIT = re.compile("[0-9a-f]{40}")

# A listing comes from outside: what could be a path, is hidden or cannot be printed is no file of ours.
_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f-\x9f\ud800-\udfff][^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,254}")

# What follows a range is mostly wanted next: the header after its length (71 kB each in DeepSeek-V3.2), the
# scales after a weight. A request costs more than these bytes.
_AHEAD = 1 << 17
_KEPT = 64

_READERS = 16
_LISTING_TRIES = 4


def locate(source: str, revision: str | None = None, *, download: bool = False) -> Place:
    """Return where a checkpoint lies: a folder, or the repository hf://org/name@revision or org/name.

    With `download`, and when the hub is offline, a repository is first brought into the hub's cache.
    Raises MlaToolsError if it is neither a folder nor a repository that can be had, UsageError for two
    revisions.
    """
    if source.startswith(_SCHEME):
        match = _URL.fullmatch(source)
        if not match:
            raise MlaToolsError(f"{shown(source)}: a repository is written hf://org/name@revision")
        name, own = match.groups()
        if own and revision and own != revision:
            raise UsageError(f"{source} names another revision than --revision {revision}.")
        revision = own or revision
        no_folder = f"{source}: "
    else:
        try:
            path = Path(source).expanduser()
            if path.exists():
                return Folder(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise MlaToolsError(f"{source[:200]}: no such folder ({error})") from error
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise MlaToolsError(f"{source}: no such folder, and not a repository name such as org/model")
        name = source
        no_folder = f"{source}: no such folder, and "
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        if download or constants.HF_HUB_OFFLINE:
            return Folder(_downloaded(name, revision))
        return open_repository(name, revision)
    except HFValidationError as error:
        raise MlaToolsError(f"{no_folder}not a repository name: {error}") from error
    except CheckpointError:
        raise
    except MlaToolsError as error:
        raise MlaToolsError(f"{no_folder}{error}") from error


def _downloaded(name: str, revision: str | None) -> Path:
    """Return the folder of a repository in the hub's cache, complete as far as a conversion needs it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MlaToolsError(f"the repository cannot be downloaded: {error}") from error


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the hub says about a file: its size, and the hash of its content."""

    size: int
    tag: str


def open_repository(
    name: str, revision: str | None = None, *, endpoint: str | None = None, sleep: Sleep | None = None
) -> Repository:
    """Return a repository at the commit that a revision (default: the default branch) names now.

    `endpoint` is another hub than HF_ENDPOINT names. Raises MlaToolsError if the hub does not give it,
    CheckpointError for a listing that is none, and HFValidationError for a name that none can have.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, user_agent="mla-tools")
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> Any:
        try:
            return api.model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        except HfHubHTTPError as error:
            response = error.response
            failure = passing(response.status_code, response.headers)
            raise failure or refusal(response.status_code, response.headers, name, revision) from error
        except HTTPError as error:
            raise PassingError(
                f"{endpoint} cannot be reached ({str(error) or type(error).__name__})"
            ) from error
        except HFValidationError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError([_no_listing(name, f"{type(error).__name__}: {error}")]) from error

    info = persist(ask, name, sleep or time.sleep, _LISTING_TRIES)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError([_no_listing(name, f"commit {shown(str(info.sha))}")])
    listed = _listed(name, info.siblings or [])
    headers = build_hf_headers(user_agent="mla-tools")
    return Repository(name, info.sha, listed, Ranges(name, info.sha, headers, sleep), endpoint)


def _listed(repository: str, siblings: list[Any]) -> dict[str, _Listed]:
    """Return the files at the top of a listing, those in a folder's sense: no paths, nothing hidden."""
    listed = {}
    problems = []
    for sibling in siblings:
        name, size = sibling.rfilename, sibling.size
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            continue
        if type(size) is not int or not 0 <= size < 1 << 62:
            problems.append(Problem(shown(name), f"is listed in {repository} without its size"))
            continue
        content = getattr(sibling.lfs, "sha256", None) or sibling.blob_id
        listed[name] = _Listed(size, content if isinstance(content, str) else "")
    if problems:
        raise CheckpointError(problems)
    return listed


def _no_listing(name: str, found: str) -> Problem:
    cause = "Check HF_ENDPOINT, if it is set."
    return Problem(name, "the hub's answer is not a listing of a repository", found=found, cause=cause)


class Repository:
    """The files at the top of a repository, at one commit; nothing of them is kept on disk."""

    def __init__(
        self, name: str, commit: str, listed: Mapping[str, _Listed], ranges: Ranges, endpoint: str
    ) -> None:
        self.name, self.revision = name, commit
        self._listed, self._ranges, self._endpoint = listed, ranges, endpoint
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], NDArray[np.uint8]] = OrderedDict()

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

    def read(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return a range of a file, in at most one request."""
        from huggingface_hub import hf_hub_url

        size = self.size(name)
        check_range(name, offset, nbytes, size)
        ahead = min(_AHEAD, size - offset - nbytes)
        data = np.empty(nbytes + ahead, np.uint8)
        done = self._recall(name, offset, data[:nbytes])
        if done < nbytes:
            url = hf_hub_url(self.name, name, revision=self.revision, endpoint=self._endpoint)
            self._ranges.fill(name, url, offset + done, data.data[done:], size)
            first = done if nbytes <= _AHEAD else nbytes
            self._keep(name, offset + first, data[first:])
        return data[:nbytes]

    def _recall(self, name: str, offset: int, data: NDArray[np.uint8]) -> int:
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

    def _keep(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        with self._lock:
            self._kept[name, offset] = data.copy()  # a view would keep all of what was read
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
