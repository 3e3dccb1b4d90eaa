"""A server on this machine that does what servers do on bad days."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

FLOOD = 128 * 2**20
"""Bytes after which an endless body ends all the same, so that who reads all of it is found out."""


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with the faults that a test sets."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        """The name in every request."""
        self.fails: dict[str, list[int]] = {}
        """Name -> the status of its next answers."""
        self.replaced: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[Handler], None]] = {}
        """Name -> what answers in the place of the folder."""
        self.sent = 0
        """Bytes of endless bodies that the network took."""
        self.waiting = threading.Event()
        """Set when an answer has begun that never ends."""
        self.over = threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none of the server's errors."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        name = self.path.rpartition("/")[2]
        server.asked.append(name)
        if server.fails.get(name):
            self.send_error(server.fails[name].pop(0))
        elif name in server.answers:
            self.close_connection = True
            server.answers[name](self)
        elif name in server.replaced or (server.folder / name).is_file():
            self.give(server.replaced.get(name) or (server.folder / name).read_bytes())
        else:
            self.send_error(404)

    def give(self, data: bytes) -> None:
        """The bytes as servers send them."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def raw(self, text: str) -> None:
        """Headers and what else the text holds, as it stands."""
        self.wfile.write(text.encode().replace(b"\n", b"\r\n"))

    def log_message(self, *_: object) -> None:
        pass


def breaks(name: str, times: int) -> Callable[[Handler], None]:
    """An answer that breaks off after 1000 bytes so many times before it is whole."""
    left = [True] * times

    def answer(handler: Handler) -> None:
        data = (handler.server.folder / name).read_bytes()
        assert len(data) > 1000
        handler.raw(f"HTTP/1.1 200 OK\nContent-Length: {len(data)}\n\n")
        handler.wfile.write(data[:1000] if left and left.pop() else data)

    return answer


def floods(start: str) -> Callable[[Handler], None]:
    """An answer of this start and then FLOOD zeros, or as many as the client takes."""

    def answer(handler: Handler) -> None:
        handler.raw(start)
        block = b"\0" * 2**16
        while handler.server.sent < FLOOD:
            handler.wfile.write(block)
            handler.server.sent += len(block)

    return answer


def waits(start: str, every: str = "") -> Callable[[Handler], None]:
    """An answer of this start that never ends: silent, or with a few bytes 50 times a second."""

    def answer(handler: Handler) -> None:
        handler.raw(start)
        handler.server.waiting.set()
        while not handler.server.over.wait(0.02 if every else None):
            handler.raw(every)

    return answer


def redirects(target: str) -> Callable[[Handler], None]:
    return lambda handler: handler.raw(f"HTTP/1.1 302 Found\nLocation: {target}\nContent-Length: 0\n\n")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder until the block ends."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
