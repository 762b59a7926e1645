"""A hub on this machine: the routes that a repository is read by, and every way in which they can fail."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, LATER = "c0ffee" + "0" * 34, "decade" + "0" * 34
NAME = "org/name"


@dataclass(frozen=True)
class Asked:
    """One request: which server it reached and what it asked for."""

    server: str
    path: str
    range: str
    token: str
    encoding: str


class Call:
    """A request for a range of a file, and the means to answer it well or badly."""

    def __init__(self, handler: BaseHTTPRequestHandler, file: str, data: bytes) -> None:
        self.handler, self.file, self.data = handler, file, data
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2])) if match else (0, len(data) - 1)
        self.first, self.stop = first, min(last + 1, len(data))

    def answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, length: int = -1
    ) -> None:
        """Send any answer; `length` is what Content-Length claims instead."""
        self.handler.send_response(status)
        for key, text in (headers or {}).items():
            self.handler.send_header(key, text)
        self.handler.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.handler.end_headers()
        self.handler.wfile.write(body)
        self.handler.close_connection = length >= 0

    def serve(self, body: bytes | None = None, total: int = -1, first: int = -1, length: int = -1) -> None:
        """Send the range that was asked for, or what is said instead."""
        if self.first >= len(self.data):
            self.answer(416, headers={"Content-Range": f"bytes */{len(self.data)}"})
            return
        start = self.first if first < 0 else first
        size = len(self.data) if total < 0 else total
        said = {"Content-Range": f"bytes {start}-{self.stop - 1}/{size}"}
        self.answer(206, self.data[self.first : self.stop] if body is None else body, said, length)


Fault = Callable[[Call], None]


class Slow:
    """A clock of its own, and a server that sends a piece each second of it; then tries wait for nothing.

    After LIMIT seconds the server hangs up: whoever has waited so long waits for ever.
    """

    LIMIT = 2000

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.given_up, self.ended = threading.Event(), threading.Event()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Note a wait between two tries, during which the server comes to an end."""
        self.waits.append(seconds)
        self.given_up.set()
        assert self.ended.wait(timeout=60)

    def drip(self, call: Call, head: bytes, pieces: Iterator[bytes], last: bytes = b"") -> None:
        """Send the head of an answer at once, a piece each second, and the last when nobody waits."""
        call.handler.close_connection = True
        try:
            call.handler.wfile.write(head)
            while not self.given_up.wait(timeout=0.001) and self.now < self.LIMIT:
                self.now += 1
                call.handler.wfile.write(next(pieces))
            call.handler.wfile.write(last)
        except ConnectionError:
            self.given_up.wait(timeout=60)
        finally:
            self.ended.set()


@dataclass
class Hub:
    """A repository of `files`; `faults` are used up by the requests for ranges, one each.

    With `cdn` the hub redirects to a second server, whose addresses hold while `signature` stays. `over` is
    set when it is: a fault may wait for that.
    """

    files: dict[str, bytes]
    url: str = ""
    elsewhere: str = ""
    cdn: bool = False
    commit: str = COMMIT
    listing: Fault | None = None
    faults: list[Fault | None] = field(default_factory=list)
    always: Fault | None = None
    signature: int = 1
    asked: list[Asked] = field(default_factory=list)
    served: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def siblings(self) -> list[dict[str, Any]]:
        """Return the files as the hub lists them: large ones with the hash that git LFS gives them."""
        found = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            found.append(entry)
        return found

    def ranges(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.range]

    def handle(self, server: str, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        with self.lock:
            asked = (handler.headers.get(key, "") for key in ("Range", "Authorization", "Accept-Encoding"))
            self.asked.append(Asked(server, path, *asked))
        if path.startswith("/api/models/"):
            call = Call(handler, "", b"")
            if self.listing:
                self.listing(call)
            elif path not in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
                known = path.startswith(f"/api/models/{NAME}/")
                call.answer(404, headers={"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            else:
                info = {"id": NAME, "sha": self.commit, "siblings": self.siblings()}
                call.answer(200, json.dumps(info).encode())
            return
        file = path.rsplit("/", 1)[1]
        call = Call(handler, file, self.files.get(file, b""))
        if server == "hub" and path != f"/{NAME}/resolve/{COMMIT}/{file}":
            call.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif server == "hub" and file not in self.files:
            call.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif server == "hub" and self.cdn:
            place = f"{self.elsewhere}/blobs/{file}?signature={self.signature}"
            call.answer(302, headers={"Location": place, "X-Repo-Commit": COMMIT})
        elif server == "cdn" and parts.query != f"signature={self.signature}":
            call.answer(403)
        else:
            with self.lock:
                fault = self.faults.pop(0) if self.faults else self.always
                self.served += max(0, call.stop - call.first)
            (fault or Call.serve)(call)


class Server(ThreadingHTTPServer):
    """A server that takes it in silence when the other side hangs up: a client may."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def running(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve files as a repository, on one port as the hub and on another as the place it redirects to."""
    hub = Hub(files)
    servers = []
    for role in ("hub", "cdn"):

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_role = role

            def do_GET(self) -> None:
                hub.handle(self.server_role, self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.url, hub.elsewhere = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        hub.over.set()
        for server in servers:
            server.shutdown()
            server.server_close()
