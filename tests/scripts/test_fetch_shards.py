"""`python scripts/fetch_shards.py` as a user runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scripts.fetch_shards import main
from shards.folder import ShardFolder
from tests.serving import Server, serving, waits

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
AT_ONCE = 30  # seconds: half of what a silent server is given
TAR = "val-00000.tar"
BODY = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"


@pytest.fixture
def server(phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(phantom_shards.path) as server:
        yield server


def start(url: str, dest: Path, code: str = "", **options: Any) -> "subprocess.Popen[str]":
    """Start `fetch_shards.py URL DEST --jobs 1` after some code, with SIGINT as a terminal leaves it."""
    path = str(ROOT / "scripts" / "fetch_shards.py")
    code = (
        f"import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.argv[1:] = [{url!r}, {str(dest)!r}, '--jobs', '1'];{code}\n"
        f"runpy.run_path({path!r}, run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--retries", "0"])


def test_a_folder_is_fetched_and_the_next_step_is_named(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    files = len(list(phantom_shards.path.iterdir()))
    for fetched in (files - 1, 0):
        result = fetch(phantom_shards.path, dest)
        assert result.exit_code == 0, result.output
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{dest}: {len(phantom_shards.manifest.shards)} shards, ")
        assert line.endswith(f" {fetched} files fetched now; next: python -m trainer --shards {dest}")
    assert len(list(dest.iterdir())) == files


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["nowhere", "dest"], 3, "nowhere/manifest.json is not there"),
        (["nowhere", "dest", "--jobs", "0"], 2, "--jobs"),
        (["nowhere"], 2, "DEST"),
        (["http://127.0.0.1:1", "dest"], 4, "run the same command to continue"),
    ],
)
def test_what_does_not_work_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    result = fetch(*arguments)
    assert result.exit_code == exit_code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and message in last
    assert list(tmp_path.iterdir()) == []


def test_without_fsspec_s3_says_what_to_install(tmp_path: Path) -> None:
    # As a process in which no package beside the standard library and click's can be imported.
    code = (
        "import runpy, sys; sys.modules['fsspec'] = None; sys.argv[1:] = ['s3://bucket/shards', 'dest'];"
        f"runpy.run_path({str(ROOT / 'scripts' / 'fetch_shards.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 4
    assert "pip install -e '.[fetch]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "every"), [("", ""), ("HTTP/1.1 200 OK\nX: ", "y"), (BODY, "1\n\0\n")], ids=["silent", "headers", "body"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_waiting_at_once_and_what_is_finished_is_kept(
    server: Server, phantom_shards: ShardFolder, tmp_path: Path, number: int, text: str, every: str
) -> None:
    dest = tmp_path / "dest"
    server.answers = {TAR: waits(text, every)}
    command = start(server.url, dest)
    assert server.waiting.wait(TIMEOUT)
    command.send_signal(number)
    _, error = command.communicate(timeout=AT_ONCE)
    assert command.returncode == 128 + number
    name = signal.Signals(number).name
    assert error.splitlines()[-1] == (
        f"stopped by {name}; finished files are kept; run the same command again to continue"
    )
    assert "Traceback" not in error
    kept, whole = files(dest), files(phantom_shards.path)
    assert "train-00000.tar" in kept and kept.items() <= whole.items()
    server.answers.clear()
    server.asked.clear()
    assert fetch(server.url, dest).exit_code == 0
    assert sorted(server.asked) == sorted({"manifest.json", *whole} - kept.keys())
    assert files(dest) == whole


def test_what_a_killed_fetch_left_does_not_pile_up(server: Server, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    server.answers = {TAR: waits(BODY, "1\n\0\n")}
    for _ in range(2):
        server.waiting.clear()
        command = start(server.url, dest)
        assert server.waiting.wait(TIMEOUT)
        command.kill()
        command.communicate(timeout=AT_ONCE)
        assert sum(path.name.startswith(".") for path in dest.iterdir()) <= 1
    server.answers.clear()
    assert fetch(server.url, dest).exit_code == 0
    assert files(dest) == files(phantom_shards.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("silent", ["the store", "the name server"])
def test_a_signal_does_not_wait_for_a_store_or_a_name_server(tmp_path: Path, number: int, silent: str) -> None:
    code = {
        "the store": (
            "import fsspec\n"
            "class Store(fsspec.AbstractFileSystem):\n"
            "    def open(self, *_, **__): hang()\n"
            "fsspec.register_implementation('silent', Store)\n"
        ),
        "the name server": "import socket; socket.getaddrinfo = lambda *_, **__: hang()\n",
    }[silent]
    hang = "def hang(): print('waiting', flush=True); import threading; threading.Event().wait()\n"
    url = {"the store": "silent://bucket", "the name server": "http://nowhere.invalid"}[silent]
    command = start(url, tmp_path / "dest", f"\n{hang}{code}", stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == "waiting\n"
    command.send_signal(number)
    _, error = command.communicate(timeout=AT_ONCE)
    assert command.returncode == 128 + number
    assert error.splitlines()[-1].startswith("stopped by ") and "Traceback" not in error


def test_a_full_disk_ends_in_exit_4_and_what_is_finished_is_kept(
    server: Server, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    dest, largest = tmp_path / "dest", 20_000  # bytes of a file: more than the tables have, less than a shard
    command = start(server.url, dest, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest},) * 2)")
    _, error = command.communicate(timeout=TIMEOUT)
    assert command.returncode == 4
    assert error.splitlines()[-1].startswith(f"Error: cannot write {dest}/") and "make room" in error
    assert "entries.csv" in files(dest) and files(dest).items() <= files(phantom_shards.path).items()
