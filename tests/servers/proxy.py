"""An HTTP proxy in front of a store, which counts what goes over the wire and makes the trouble it is told to."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

_CHUNK = 64 << 10


class Seen(NamedTuple):
    """A request that went through."""

    method: str
    path: str
    sent: int
    """Bytes of its body."""
    received: int
    """Bytes of the body of the answer."""
    status: int


@dataclass
class Proxy:
    """What it does, which may be changed at any time, and what it saw."""

    port: int = 0
    trouble: Callable[[str, str], str | None] = lambda _method, _path: None
    """By method and path: ``503``, ``403`` and ``expired`` are answered without the store, ``reset`` cuts the answer
    in the middle, ``slow`` delays it, ``lost`` cuts it before it begins, after the store has done its work, ``hang``
    never answers."""
    hanging: threading.Event = field(default_factory=threading.Event)
    """Set when a request hangs."""
    release: threading.Event = field(default_factory=threading.Event)
    """Ends what hangs."""
    seen: list[Seen] = field(default_factory=list)

    def sent(self) -> int:
        return sum(request.sent for request in self.seen)

    def received(self) -> int:
        return sum(request.received for request in self.seen)


def times(count: int, what: str, *, when: Callable[[str, str], bool]) -> Callable[[str, str], str | None]:
    """Trouble of one kind for the first ``count`` requests of those that ``when`` is true of."""
    left = [count]
    lock = threading.Lock()

    def trouble(method: str, path: str) -> str | None:
        with lock:
            if not when(method, path) or left[0] == 0:
                return None
            left[0] -= 1
            return what

    return trouble


@contextmanager
def proxy_to(upstream: int) -> Iterator[Proxy]:
    """A proxy before the server on port ``upstream``."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Answers are written in pieces; Nagle's algorithm would hold each back for a while.
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def _forward(self) -> None:
            body = _body_of(self)
            trouble = proxy.trouble(self.command, self.path)
            if trouble in _REFUSALS:
                status, text = _REFUSALS[trouble]
                _answer(self, status, text)
                proxy.seen.append(Seen(self.command, self.path, len(body), 0, status))
                return
            if trouble == "slow":
                time.sleep(1.0)
            if trouble == "hang":
                proxy.hanging.set()
                proxy.release.wait()
                self.close_connection = True
                return
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            if body or self.command in ("PUT", "POST"):
                headers["Content-Length"] = str(len(body))
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            received = 0
            if trouble == "lost":
                answer.read()
            else:
                received = self._return(answer, cut=trouble == "reset")
            if trouble in ("lost", "reset"):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            proxy.seen.append(Seen(self.command, self.path, len(body), received, answer.status))

        def _return(self, answer: http.client.HTTPResponse, *, cut: bool) -> int:
            data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    self.send_header(name, value.replace(f"127.0.0.1:{upstream}", f"127.0.0.1:{proxy.port}"))
            length = answer.getheader("content-length") if self.command == "HEAD" else str(len(data))
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            part = data[: len(data) // 2] if cut else data
            self.wfile.write(part)
            self.wfile.flush()
            return len(part)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815 - the names of http.server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}
_REFUSALS = {
    "403": (403, "<Code>AccessDenied</Code><Message>not for you</Message>"),
    "503": (503, "<Code>SlowDown</Code><Message>reduce your rate</Message>"),
    "expired": (400, "<Code>ExpiredToken</Code><Message>the token is old</Message>"),
}


def _answer(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
    body = f"<?xml version='1.0'?><Error>{text}</Error>".encode()
    if "/storage/v1/" in handler.path:
        body = b'{"error": {"code": %d, "message": "not for you"}}' % status
    handler.send_response_only(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _body_of(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("transfer-encoding", ""):
        return handler.rfile.read(int(handler.headers.get("content-length", 0)))
    body = bytearray()
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return bytes(body)
