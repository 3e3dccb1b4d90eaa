"""Fetching from a server on this machine that does what servers do on bad days."""

import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import BadData, CannotResume, ResourceMissing
from shards.fetching import Fetched, fetch_shards
from shards.folder import open_shards
from shards.locking import only_one
from shards.verification import verify_shards

TAR = "train-00001.tar"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with the faults that a test sets."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, int]] = []
        """Name and first byte of every request."""
        self.honours_range = True
        self.breaks_after: int | None = None
        """Bytes of an answer after which the connection is closed."""
        self.breaks: int | None = None
        """How often it does that before it behaves; None: always."""
        self.breaks_in = ""
        """In which file; empty: in every one."""
        self.fails: dict[str, list[int]] = {}
        """Name -> the status of its next answers."""
        self.replaced: dict[str, bytes] = {}

    def breaks_now(self, name: str, size: int) -> bool:
        if self.breaks_after is None or self.breaks == 0 or size <= self.breaks_after:
            return False
        if self.breaks_in not in ("", name):
            return False
        if self.breaks is not None:
            self.breaks -= 1
        return True


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        name = self.path.rpartition("/")[2]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        server.asked.append((name, start))
        if server.fails.get(name):
            return self.send_error(server.fails[name].pop(0))
        path = server.folder / name
        if not path.is_file():
            return self.send_error(404)
        data = server.replaced.get(name, path.read_bytes())
        if match and server.honours_range:
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            data = data[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: server.breaks_after] if server.breaks_now(name, len(data)) else data)
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The packed shards behind HTTP."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(packed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "dest"


def fetch(url: str | Path, dest: Path, retries: int = 2, jobs: int = 2) -> Fetched:
    return fetch_shards(str(url), dest, jobs=jobs, retries=retries, backoff=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_fetched_folder_is_byte_for_byte_the_one_that_was_packed(
    server: Server, packed: Path, dest: Path, jobs: int
) -> None:
    assert fetch(server.url, dest, jobs=jobs).files == 12
    assert contents(dest) == contents(packed)
    assert verify_shards(dest).faults == ()
    assert sorted(server.asked) == sorted((name, 0) for name in contents(packed))


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_path_and_a_file_url_are_fetched_as_well(packed: Path, dest: Path, form: str) -> None:
    fetch(form.format(packed), dest)
    assert contents(dest) == contents(packed)


def test_whatever_fsspec_knows_is_fetched_as_well(packed: Path, dest: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(packed), "/bucket/shards", recursive=True)
    try:
        fetch("memory://bucket/shards", dest)
        assert contents(dest) == contents(packed)
        store.rm(f"/bucket/shards/{TAR}")
        shutil.rmtree(dest)
        with pytest.raises(BadData, match=rf"memory://bucket/shards/{TAR} is not there"):
            fetch("memory://bucket/shards", dest)
    finally:
        store.rm("/bucket", recursive=True)


def test_a_second_run_asks_for_the_manifest_alone_and_writes_nothing(server: Server, dest: Path) -> None:
    fetch(server.url, dest)
    server.asked.clear()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (dest, *dest.iterdir())}
    assert fetch(server.url, dest).files == 0
    assert server.asked == [("manifest.json", 0)]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (dest, *dest.iterdir())} == before


def test_a_file_that_was_lost_or_damaged_here_is_fetched_again(
    server: Server, packed: Path, dest: Path
) -> None:
    fetch(server.url, dest)
    (dest / TAR).unlink()
    (dest / "train-00000.idx").write_bytes(b"x")
    assert fetch(server.url, dest).files == 2
    assert contents(dest) == contents(packed)


def test_a_connection_that_breaks_again_and_again_is_continued_where_it_broke(
    server: Server, packed: Path, dest: Path
) -> None:
    server.breaks_after = 1000
    size = (packed / TAR).stat().st_size
    fetch(server.url, dest, retries=1)
    assert contents(dest) == contents(packed)
    assert [start for name, start in server.asked if name == TAR] == list(range(0, size, 1000))


def test_a_server_that_ignores_ranges_is_asked_for_the_whole_again(
    server: Server, packed: Path, dest: Path
) -> None:
    server.honours_range, server.breaks_after, server.breaks, server.breaks_in = False, 1000, 1, TAR
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)
    assert [start for name, start in server.asked if name == TAR] == [0, 1000]


def test_after_the_last_retry_what_came_is_kept_and_the_next_call_goes_on(
    server: Server, packed: Path, dest: Path
) -> None:
    server.breaks_after, server.breaks, server.breaks_in = 1000, 1, TAR
    server.fails = {TAR: []}
    with pytest.raises(
        ResourceMissing, match=rf"cannot fetch {TAR} from {server.url}: .* broke off .* bytes"
    ):
        fetch(server.url, dest, retries=0)
    assert (dest / f".{TAR}.partial").stat().st_size == 1000
    assert "manifest.json" not in finished(dest) and TAR not in finished(dest)
    with pytest.raises(BadData, match="no shards in"):
        open_shards(dest)
    server.asked.clear()
    fetch(server.url, dest, retries=0)
    assert (TAR, 1000) in server.asked and (TAR, 0) not in server.asked
    assert contents(dest) == contents(packed)


def test_a_partial_file_that_is_whole_already_is_not_fetched_again(
    server: Server, packed: Path, dest: Path
) -> None:
    dest.mkdir()
    for name in (TAR, "entries.csv"):
        shutil.copy(packed / name, dest / f".{name}.partial")
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)
    assert TAR not in [name for name, _ in server.asked]


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_partial_file_of_something_else_is_begun_anew(
    server: Server, packed: Path, dest: Path, size: int
) -> None:
    dest.mkdir()
    (dest / f".{TAR}.partial").write_bytes(b"x" * size)
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_answer_of_the_moment_is_tried_again(
    server: Server, packed: Path, dest: Path, status: int
) -> None:
    server.fails = {"manifest.json": [status], TAR: [status, status]}
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


def test_an_answer_that_stays_bad_ends_in_exit_4(server: Server, dest: Path) -> None:
    server.fails = {TAR: [503] * 3}
    with pytest.raises(
        ResourceMissing, match=rf"cannot fetch {TAR} .*503 Service Unavailable; .*same command"
    ):
        fetch(server.url, dest)
    assert "manifest.json" not in finished(dest)


def test_a_file_that_may_not_be_read_is_not_tried_again(server: Server, dest: Path) -> None:
    server.fails = {TAR: [403]}
    with pytest.raises(ResourceMissing, match=rf"{TAR} may not be read \(403 Forbidden\)"):
        fetch(server.url, dest)
    assert server.asked.count((TAR, 0)) == 1


@pytest.mark.parametrize("name", ["manifest.json", TAR, "train-00001.idx", "rejects.csv"])
def test_a_file_that_is_not_there_is_named(server: Server, dest: Path, name: str) -> None:
    server.fails = {name: [404]}
    with pytest.raises(BadData, match=rf"{server.url}/{name} is not there \(404 Not Found\)"):
        fetch(server.url, dest)
    assert not (dest / "manifest.json").exists()


@pytest.mark.parametrize("name", [TAR, "train-00001.idx", "entries.csv", "rejects.csv"])
@pytest.mark.parametrize("how", ["other", "longer", "shorter"])
def test_a_file_with_other_bytes_is_named_and_not_kept(
    server: Server, packed: Path, dest: Path, name: str, how: str
) -> None:
    data = (packed / name).read_bytes()
    server.replaced = {
        name: {"other": data[:-1] + b"\1", "longer": data + b"\0" * 512, "shorter": data[:-5]}[how]
    }
    with pytest.raises(BadData, match=rf"{server.url}/{name} is not the file that the manifest names"):
        fetch(server.url, dest)
    assert not (dest / name).exists() and not (dest / f".{name}.partial").exists()
    assert not (dest / "manifest.json").exists()
    server.replaced.clear()
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'"train-00000.tar"',
            b'"../x/train-00000.tar"',
            r"names '\.\./x/train-00000\.tar', which is no shard",
        ),
        (b'"rejects": 0', b'"rejects": 1', "its text is not the one that its sha256 was made of"),
        (b"{", b"[", "is damaged"),
    ],
)
def test_a_manifest_that_is_not_to_be_trusted_stops_before_anything_is_written(
    server: Server, packed: Path, dest: Path, old: bytes, new: bytes, message: str
) -> None:
    server.replaced = {"manifest.json": (packed / "manifest.json").read_bytes().replace(old, new, 1)}
    with pytest.raises(BadData, match=message) as error:
        fetch(server.url, dest)
    assert error.value.message.startswith(f"{server.url}/manifest.json")
    assert not dest.exists() and server.asked == [("manifest.json", 0)]


def test_other_shards_or_files_here_are_not_touched(server: Server, packed: Path, dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.txt").touch()
    with pytest.raises(CannotResume, match=r"holds thesis\.txt, which .* has not"):
        fetch(server.url, dest)
    assert finished(dest) == ["thesis.txt"]


def test_another_shard_folder_here_is_not_touched(
    server: Server, phantom_shards: object, packed: Path
) -> None:
    folder = phantom_shards.path  # type: ignore[attr-defined]
    before = contents(folder)
    with pytest.raises(CannotResume, match="holds other shards than"):
        fetch(server.url, folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_refused(server: Server, dest: Path) -> None:
    dest.write_text("in the way")
    with pytest.raises(BadData, match="is a file, where a folder is needed"):
        fetch(server.url, dest)


def test_two_commands_at_once_do_not_write_into_one_folder(server: Server, dest: Path) -> None:
    with only_one(dest), pytest.raises(ResourceMissing, match="another command is"):
        fetch(server.url, dest)
    assert list(dest.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://127.0.0.1:1/x", ResourceMissing, r"cannot fetch manifest\.json from .*refused"),
        ("http://[::1/x", BadData, "is no URL"),
        ("http://127.0.0.1/a b", BadData, "is no URL"),
        ("nowhere/at/all", BadData, r"nowhere/at/all/manifest\.json is not there"),
        ("sesame://x", BadData, "Protocol not known: sesame"),
    ],
)
def test_a_url_that_leads_nowhere_says_so(
    dest: Path, monkeypatch: pytest.MonkeyPatch, url: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(error, match=message):
        fetch(url, dest)
    assert not dest.exists()
