"""Ranges of files on a hub: redirects, retries, and nothing believed that can be checked.

A hub answers for a large file with a redirect to a signed address elsewhere, which expires. It is kept and
asked again until it is refused, because hubs count the requests that they redirect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.network import Arrival, Client, PassingError, origin, passing, plain, server_of
from mla_tools.files.place import shown

__all__ = ["Ranges", "refusal"]

_PATIENCE = 30.0  # seconds, and one more for each so many bytes
_LEAST_MEAN = 4096

_ANSWERS = {200, 206, 416}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


def refusal(
    status: int, headers: Mapping[str, str], repository: str, revision: str | None, file: str = ""
) -> MlaToolsError:
    """Return the error for an answer of the hub itself that no other try will change."""
    code = headers.get("X-Error-Code", "")
    subject = f"{repository}: {shown(file)}" if file else repository
    login = 'log in with "hf auth login" or set HF_TOKEN'
    if code == "GatedRepo":
        return MlaToolsError(f"{repository} is gated: accept its terms on its page on the hub, then {login}.")
    if status == 401 and "credentials" in headers.get("X-Error-Message", ""):
        return MlaToolsError(f"{subject}: the hub does not know the token (401); {login}.")
    if code == "RevisionNotFound":
        return MlaToolsError(f"{repository} has no revision {shown(revision or 'main')}.")
    if file and status in (404, 410):
        return CheckpointError([Problem(shown(file), f"is listed in {repository} but is not there")])
    if code == "RepoNotFound" or status in (401, 404):
        what = "there is no such repository"
        if status == 404 and revision and not code:
            what += f", or it has no revision {shown(revision)}"
        return MlaToolsError(f"{subject}: {what}; if it is private or gated, {login}.")
    if status == 403:
        return MlaToolsError(f"{subject}: the hub refuses it (403); {login}, with a token that may read it.")
    return MlaToolsError(f"{subject} cannot be read: the server answers {status}.")


class Ranges:
    """Reads ranges of the files of one commit; any thread may."""

    def __init__(self, repository: str, commit: str, client: Client) -> None:
        self._repository, self._commit, self._client = repository, commit, client
        self._addresses: dict[str, str] = {}

    def stop(self) -> None:
        """End every read that is under way, at once, with an MlaToolsError."""
        self._client.stop()

    def fill(self, file: str, url: str, offset: int, view: memoryview, size: int) -> None:
        """Fill `view` with the bytes of a file from byte `offset`; the whole file has `size` bytes.

        A connection that breaks loses nothing: the next try asks for what is still missing. Raises
        CheckpointError where the file is not what it should be, MlaToolsError where it cannot be had.
        """
        done = 0

        def store(piece: bytes) -> None:
            nonlocal done
            view[done : done + len(piece)] = piece
            done += len(piece)

        def read(arrival: Arrival) -> None:
            start, stop = offset + done, offset + len(view)
            with self._answer(file, url, start, stop) as response:
                left = _promised(file, response, start, stop, size)
                arrival.begin(_PATIENCE + left / _LEAST_MEAN)
                for piece in response.iter_raw():
                    left -= len(piece)
                    if left < 0:
                        raise CheckpointError([Problem(shown(file), "the server sends more than it says")])
                    arrival.take(piece, store)

        def ask() -> None:
            self._client.watched(read)
            if done < len(view):
                raise PassingError(f"only {done:,} of {len(view):,} bytes came")

        self._client.persist(ask, f"{self._repository}: {shown(file)}")

    @contextmanager
    def _answer(self, file: str, url: str, start: int, stop: int) -> Iterator[Any]:
        """Yield the answer with the bytes, from the hub or from where it sends us."""
        subject = f"{self._repository}: {shown(file)}"
        asked = {"Range": f"bytes={start}-{stop - 1}"}
        if kept := self._addresses.get(url):
            with self._client.ask(subject, kept, url, asked) as response:
                if response.status_code in _ANSWERS:
                    yield response
                    return
                if failure := passing(response.status_code, response.headers):
                    raise failure
            self._addresses.pop(url, None)
        with self._client.follow(subject, url, asked, self._check_commit) as (address, response):
            if failure := passing(response.status_code, response.headers):
                raise failure
            if response.status_code not in _ANSWERS:
                raise self._refused(file, response, address, url)
            if origin(address) != origin(url):
                self._addresses[url] = address
            yield response

    def _check_commit(self, response: Any) -> None:
        commit = response.headers.get("X-Repo-Commit", self._commit)
        if commit != self._commit:
            what = f"the hub answers with another commit, {shown(commit)}"
            raise MlaToolsError(f"{self._repository}: {what}.")

    def _refused(self, file: str, response: Any, address: str, url: str) -> MlaToolsError:
        status = response.status_code
        if origin(address) == origin(url):
            return refusal(status, response.headers, self._repository, self._commit, file)
        host = server_of(address)
        return MlaToolsError(
            f"{self._repository}: {shown(file)} cannot be read: {host}, where the hub redirects to,"
            f" answers {status}."
        )


def _promised(file: str, response: Any, start: int, stop: int, size: int) -> int:
    """Return how many bytes an answer brings, after checking that they are those that were asked for."""
    plain(shown(file), response)
    if response.status_code == 416:
        found = response.headers.get("Content-Range", "")
        needed = f"bytes {start:,} to {stop:,} of {size:,}"
        cause = "The hub lists another size than its file has; this may be a broken upload."
        raise CheckpointError([Problem(shown(file), "ends too early", needed, shown(found), cause)])
    if response.status_code == 200:
        if (start, stop) != (0, size):
            host = response.url.host
            raise MlaToolsError(
                f"{shown(file)} cannot be read by ranges: {host} sends the whole file instead;"
                " --download fetches the files first."
            )
        return size
    found = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(found.strip())
    if not match or int(match[1]) != start or not start <= int(match[2]) < stop:
        needed = f"bytes {start}-{stop - 1}/{size}"
        raise CheckpointError([Problem(shown(file), "the server sends another range", needed, shown(found))])
    if match[3] not in ("*", str(size)):
        needed, found = f"{size:,} bytes, as the hub lists it", f"{int(match[3]):,} bytes"
        raise CheckpointError([Problem(shown(file), "has the wrong size", needed, found)])
    return int(match[2]) + 1 - start
