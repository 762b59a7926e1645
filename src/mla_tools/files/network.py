"""Answers of servers that may be broken or hostile: every wait for one ends, and it is asked for again.

A server can keep a reader busy with a byte a second: in the body, between the headers, or in what frames
them, where no timeout of a socket and no check of arrived bytes sees it. So a thread of its own reads each
answer, and the one who wants it watches the clock.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.place import shown
from mla_tools.files.settings import constants, one_line, session, without_user

__all__ = [
    "Arrival",
    "Client",
    "Clock",
    "Pace",
    "PassingError",
    "Sleep",
    "origin",
    "passing",
    "persist",
    "plain",
    "server_of",
]

T = TypeVar("T")
Clock = Callable[[], float]
Sleep = Callable[[float], object]

_TRIES = 9  # with the waits between them a little over two minutes
_FIRST_WAIT = 0.5
_MAX_WAIT = 600.0  # hubs count requests in windows of five minutes

_LOOK = 0.1  # seconds between two looks at the clock
_QUIET = 30.0
_LEAST = 1024  # bytes a second; sixteen readers share a line

_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_MAX_LOCATION = 8192

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
                reason = f"{failure}, and asks for a pause of {wait:,.0f} seconds"
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
        from email.utils import parsedate_to_datetime

        try:
            wait = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return PassingError(reason)
        return PassingError(reason, max(0.0, wait))
    if status == 429 and (reset := _RESET.search(headers.get("RateLimit", ""))):
        return PassingError(reason, float(reset[1]) + 1)
    return PassingError(reason)


class Pace:
    """What time an answer may take, in seconds: `quiet` is how long a server may be silent.

    The head of the answer has twice that time. Then so many bytes must come in each such time as a slow
    line brings, and all of it in the seconds that the reader says.
    """

    def __init__(self, start: float, quiet: float) -> None:
        self._start, self._quiet = start, quiet
        self._mark, self._marked = -1.0, 0

    def breach(self, now: float, seconds: float | None, count: int) -> str:
        """Return what is wrong now, or nothing; `seconds` is None until the head of the answer is there."""
        quiet = self._quiet
        if seconds is None:
            late = now - self._start > 2 * quiet
            return f"no answer came in {2 * quiet:,.0f} seconds" if late else ""
        if self._mark < 0:
            self._start = self._mark = now
        if count - self._marked >= _LEAST * quiet:
            self._mark, self._marked = now, count
        if now - self._mark > quiet:
            return f"fewer than {_LEAST:,} bytes a second come"
        return (
            f"the answer is not complete after {seconds:,.0f} seconds" if now - self._start > seconds else ""
        )


class Arrival:
    """An answer on its way: one thread reads it, another watches, and leaves when it takes too long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = False
        self.seconds: float | None = None
        self.count = 0

    def begin(self, seconds: float) -> None:
        """Note that the head is there, and how long the rest may take."""
        self.seconds = seconds

    def take(self, piece: bytes, store: Callable[[bytes], object]) -> None:
        """Store a piece, unless nobody waits any more: the place for it may have been read, or given away."""
        with self._lock:
            if self._left:
                raise PassingError("nobody waits for it")
            store(piece)
            self.count += len(piece)

    def leave(self) -> None:
        with self._lock:
            self._left = True


class Client:
    """Asks servers for what belongs to one repository; any thread may."""

    def __init__(
        self,
        repository: str,
        headers: Mapping[str, str],
        sleep: Sleep | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._repository, self._clock = repository, clock
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        # What is not asked for is not decompressed either: a few kilobytes can stand for gigabytes.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._strangers = {key: text for key, text in self._headers.items() if key.lower() != "authorization"}

    def stop(self) -> None:
        """End all that is under way, at once, with an MlaToolsError."""
        self._stopped.set()

    def persist(self, action: Callable[[], T], subject: str, tries: int = _TRIES) -> T:
        """Return what `action` returns, tried again while that may help."""

        def go() -> T:
            self._go_on()
            return action()

        return persist(go, subject, self._sleep, tries)

    def watched(self, read: Callable[[Arrival], T]) -> T:
        """Return what `read` returns; PassingError if the answer that it reads takes too long.

        It is left alone then: its thread ends when a piece comes or the connection does.
        """
        arrival, done = Arrival(), threading.Event()
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(read(arrival))
            except BaseException as error:
                future.set_exception(error)
            finally:
                done.set()

        pace = Pace(self._clock(), max(_QUIET, constants().HF_HUB_DOWNLOAD_TIMEOUT))
        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            while not done.wait(_LOOK):
                self._go_on()
                if reason := pace.breach(self._clock(), arrival.seconds, arrival.count):
                    raise PassingError(reason)
        finally:
            arrival.leave()
        return future.result()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise MlaToolsError(f"{self._repository}: reading was stopped.")

    @contextmanager
    def follow(
        self, subject: str, url: str, headers: Mapping[str, str], check: Callable[[Any], object] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield the address where redirects end and the answer there; `check` sees each answer of the hub."""
        address = url
        for _ in range(_MAX_REDIRECTS):
            with self.ask(subject, address, url, headers) as response:
                if check and origin(address) == origin(url):
                    check(response)
                location = response.headers.get("Location")
                if response.status_code not in _REDIRECTS or not location:
                    yield address, response
                    return
            address = _next(subject, address, location)
        raise MlaToolsError(f"{subject}: the hub redirects in a circle.")

    @contextmanager
    def ask(self, subject: str, address: str, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """Yield the answer of one server; only the hub itself, where `url` is, is shown the token."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        client = session()
        at_hub = origin(address) == origin(url)
        own = self._headers if at_hub else self._strangers
        # Without a timeout a connection that the other side forgot would be waited for without end.
        timeout = constants().HF_HUB_DOWNLOAD_TIMEOUT
        try:
            request = client.build_request("GET", address, headers={**own, **headers}, timeout=timeout)
        except Exception as error:  # the HTTP library has more errors for an address than it names
            what = f"{shown(without_user(address))}, which is not an address ({one_line(error)})"
            by = "HF_ENDPOINT leads to" if address == url else "the hub redirects to"
            raise MlaToolsError(f"{subject}: {by} {what}.") from error
        try:
            response = client.send(request, stream=True, follow_redirects=False)
        except HTTPError as error:
            # Before its second version the library reads a Location even if it is not to follow it.
            if type(error.__context__).__name__ == "InvalidURL":
                what = (
                    f"the hub redirects to something that is not an address ({one_line(error.__context__)})"
                )
                raise MlaToolsError(f"{subject}: {what}.") from error
            if type(error).__name__.startswith("Connect"):
                raise PassingError(f"{server_of(address)} cannot be reached ({one_line(error)})") from error
            raise PassingError(f"the connection fails ({one_line(error)})") from error
        except (OSError, ValueError) as error:  # a name that no server can have
            what = f"{server_of(address)} cannot be reached ({one_line(error)})"
            raise MlaToolsError(f"{subject}: {what}.") from error
        try:
            try:
                yield response
            finally:
                response.close()
        except HTTPError as error:
            raise PassingError(f"the connection fails ({one_line(error)})") from error


def origin(url: str) -> tuple[str, str]:
    """Return what makes a server the same: scheme, and host with its port."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def server_of(address: str) -> str:
    """Return an address up to its port, without what may be a password in it."""
    return shown("://".join(origin(without_user(address))))


def plain(subject: str, response: Any) -> None:
    """Raise CheckpointError for an answer whose bytes are not those that were asked for."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise CheckpointError([Problem(subject, "the server sends compressed data, which was not requested")])


def _next(subject: str, address: str, location: str) -> str:
    """Return the address that a redirect leads to; MlaToolsError if nothing should be fetched there."""
    try:
        target = urljoin(address, location)
        parts = urlsplit(target)
        secure = parts.scheme == "https" or (parts.scheme == "http" and urlsplit(address).scheme == "http")
        if secure and parts.hostname and len(location) <= _MAX_LOCATION:
            return target
    except ValueError:
        pass
    raise MlaToolsError(f"{subject}: the hub redirects to {shown(location)}, which is not safe.")
