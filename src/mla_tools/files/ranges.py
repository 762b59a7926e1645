"""Ranges of files on a hub: redirects, retries, and nothing believed that can be checked.

A hub answers for a large file with a redirect to a signed address elsewhere, which expires. It is kept and
asked again until it is refused, because hubs count the requests that they redirect.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.place import shown

__all__ = ["PassingError", "Ranges", "passing", "persist", "refusal"]

T = TypeVar("T")
Sleep = Callable[[float], object]

_TRIES = 9  # with the waits between them a little over two minutes
_FIRST_WAIT = 0.5
_MAX_WAIT = 600.0  # hubs count requests in windows of five minutes
_MAX_REDIRECTS = 5

_REDIRECTS = {301, 302, 303, 307, 308}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_RESET = re.compile(r";\s*t=(\d{1,9})")


class PassingError(Exception):
    """What may be over at the next try; `wait` is the time that the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def persist(action: Callable[[], T], subject: str, sleep: Sleep, tries: int = _TRIES) -> T:
    """Return what `action` returns, tried again after a PassingError; the last is an MlaToolsError."""
    for number in range(tries - 1):
        try:
            return action()
        except PassingError as failure:
            wait = _FIRST_WAIT * 2**number if failure.wait is None else failure.wait
            if wait > _MAX_WAIT:
                reason = f"{failure}, and wants to be left alone for {wait:,.0f} seconds"
                raise MlaToolsError(f"{subject} cannot be read: {reason}.") from failure
            sleep(wait)
    try:
        return action()
    except PassingError as failure:
        raise MlaToolsError(
            f"{subject} cannot be read: {failure}; given up after {tries} tries."
        ) from failure


def passing(status: int, headers: Mapping[str, str]) -> PassingError | None:
    """Return an answer as a failure that may pass: busy, broken or out of patience; None for any other."""
    if status != 429 and status != 408 and status < 500:
        return None
    reason = f"the server answers {status}"
    asked = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", asked):
        return PassingError(reason, float(asked))
    if asked:
        try:
            wait = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return PassingError(reason)
        return PassingError(reason, max(0.0, wait))
    if status == 429 and (reset := _RESET.search(headers.get("RateLimit", ""))):
        return PassingError(reason, float(reset[1]) + 1)
    return PassingError(reason)


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

    def __init__(
        self, repository: str, commit: str, headers: Mapping[str, str], sleep: Sleep | None = None
    ) -> None:
        self._repository, self._commit = repository, commit
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._strangers = {key: text for key, text in self._headers.items() if key.lower() != "authorization"}
        self._addresses: dict[str, str] = {}

    def stop(self) -> None:
        """End every read that is under way, at its next byte or try, with an MlaToolsError."""
        self._stopped.set()

    def fill(self, file: str, url: str, offset: int, view: memoryview, size: int) -> None:
        """Fill `view` with the bytes of a file from byte `offset`; the whole file has `size` bytes.

        A connection that breaks loses nothing: the next try asks for what is still missing. Raises
        CheckpointError where the file is not what it should be, MlaToolsError where it cannot be had.
        """
        done = 0

        def ask() -> None:
            nonlocal done
            self._go_on()
            for piece in self._pieces(file, url, offset + done, offset + len(view), size):
                self._go_on()
                view[done : done + len(piece)] = piece
                done += len(piece)
            if done < len(view):
                raise PassingError(f"only {done:,} of {len(view):,} bytes came")

        persist(ask, f"{self._repository}: {shown(file)}", self._sleep)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise MlaToolsError(f"{self._repository}: reading was stopped.")

    def _pieces(self, file: str, url: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield the bytes from `start`, up to `stop` or less, as they come."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            with self._answer(file, url, start, stop) as response:
                left = _promised(file, response, start, stop, size)
                for piece in response.iter_raw():
                    left -= len(piece)
                    if left < 0:
                        raise CheckpointError([Problem(shown(file), "the server sends more than it says")])
                    yield piece
        except HTTPError as error:
            raise PassingError(f"the connection fails ({str(error) or type(error).__name__})") from error

    @contextmanager
    def _answer(self, file: str, url: str, start: int, stop: int) -> Iterator[Any]:
        """Yield the answer with the bytes, from the hub or from where it sends us."""
        if kept := self._addresses.get(url):
            with self._ask(kept, url, start, stop) as response:
                if response.status_code in (200, 206, 416):
                    yield response
                    return
                if failure := passing(response.status_code, response.headers):
                    raise failure
            self._addresses.pop(url, None)
        address = url
        for _ in range(_MAX_REDIRECTS):
            with self._ask(address, url, start, stop) as response:
                status, location = response.status_code, response.headers.get("Location")
                if status not in _REDIRECTS or not location:
                    if failure := passing(status, response.headers):
                        raise failure
                    if status not in (200, 206, 416):
                        raise self._refused(file, response, address, url)
                    if _origin(address) != _origin(url):
                        self._addresses[url] = address
                    yield response
                    return
            address = self._next(file, address, location)
        raise MlaToolsError(f"{self._repository}: {shown(file)}: the hub redirects in a circle.")

    @contextmanager
    def _ask(self, address: str, url: str, start: int, stop: int) -> Iterator[Any]:
        """Yield the answer of one server; only the hub itself is shown the token."""
        from huggingface_hub import constants, get_session

        at_hub = _origin(address) == _origin(url)
        headers = {**(self._headers if at_hub else self._strangers), "Range": f"bytes={start}-{stop - 1}"}
        # Without a timeout a connection that the other side forgot would be waited for without end.
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", address, headers=headers, timeout=timeout, follow_redirects=False
        ) as response:
            commit = response.headers.get("X-Repo-Commit", self._commit) if at_hub else self._commit
            if commit != self._commit:
                what = f"the hub answers with another commit, {shown(commit)}"
                raise MlaToolsError(f"{self._repository}: {what}.")
            yield response

    def _next(self, file: str, address: str, location: str) -> str:
        try:
            target = urljoin(address, location)
            parts = urlsplit(target)
            secure = parts.scheme == "https" or (
                parts.scheme == "http" and urlsplit(address).scheme == "http"
            )
            if secure and parts.hostname:
                return target
        except ValueError:
            pass
        raise MlaToolsError(
            f"{self._repository}: {shown(file)}: the hub redirects to {shown(location)}, which is not safe."
        )

    def _refused(self, file: str, response: Any, address: str, url: str) -> MlaToolsError:
        status = response.status_code
        if _origin(address) == _origin(url):
            return refusal(status, response.headers, self._repository, self._commit, file)
        host = urlsplit(address).netloc
        return MlaToolsError(
            f"{self._repository}: {shown(file)} cannot be read: {host}, where the hub redirects to,"
            f" answers {status}."
        )


def _promised(file: str, response: Any, start: int, stop: int, size: int) -> int:
    """Return how many bytes an answer brings, after checking that they are those that were asked for."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise CheckpointError(
            [Problem(shown(file), "the server sends it compressed, which was not asked for")]
        )
    if response.status_code == 416:
        found = response.headers.get("Content-Range", "")
        needed = f"bytes {start:,} to {stop:,} of {size:,}"
        cause = "The hub lists another size than its file has; this may be a broken upload."
        raise CheckpointError([Problem(shown(file), "ends before it should", needed, shown(found), cause)])
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
        raise CheckpointError([Problem(shown(file), "has another size than it should", needed, found)])
    return int(match[2]) + 1 - start


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
