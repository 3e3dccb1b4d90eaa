"""How commands end: output that nobody takes, files that may not be read, Ctrl-C, names with controls."""

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.console import printable
from shards.folder import ShardFolder
from tests.trainer.running import ROOT, command, metrics

MINUTE = 60


def python(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=2 * MINUTE, **options
    )


def shell(line: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which "$@" is Python with these arguments; the exit code is Python's."""
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * MINUTE,
    )


def assert_one_line(done: "subprocess.CompletedProcess[str]", code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert all(part in last for part in said), done.stderr


@pytest.fixture
def verify(phantom_shards: ShardFolder) -> list[object]:
    return ["scripts/verify_shards.py", phantom_shards.path]


@pytest.mark.parametrize("redirect", ["", "2>&1 >/dev/null"])
def test_a_command_whose_reader_has_gone_ends_as_sigpipe_ends_it(redirect: str, verify: list[object]) -> None:
    done = shell(f'"$@" {redirect} | true; exit ${{PIPESTATUS[0]}}', *verify)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_a_missing_resource(verify: list[object]) -> None:
    assert_one_line(shell('"$@" > /dev/full', *verify), 4, "cannot write to standard output: No space left")
    assert shell('"$@" 2> /dev/full', *verify).returncode == 4


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_where_standard_streams_are_closed(closed: str, verify: list[object], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = shell(f'"$@" {closed}', *verify, "--json", record)
    assert done.returncode == 0, done.stderr
    assert json.loads(record.read_text())["faults"] == []


@pytest.mark.parametrize("line", ['"$@" | head -c 1; exit ${PIPESTATUS[0]}', '"$@" >&- 2>&-'])
def test_training_outlives_its_reader(phantom_shards: ShardFolder, tmp_path: Path, line: str) -> None:
    done = shell(line, *command(phantom_shards, tmp_path, "run", epochs=2)[1:])
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run", "epoch")) == 2
    assert "run finished: all epochs done" in (tmp_path / "run" / "log.txt").read_text()


def test_training_into_a_full_device_ends_with_its_resource(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    done = shell('"$@" > /dev/full', *command(phantom_shards, tmp_path, "run", epochs=2)[1:])
    assert_one_line(done, 4, "cannot write to standard output")


def without_root_rights() -> None:
    """Have root meet the permissions of files as every other user does: prctl(PR_CAPBSET_DROP)."""
    if os.getuid() == 0:
        for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, right)


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "manifest.json": lambda shards: shards / "manifest.json",
    "entries.csv": lambda shards: shards / "entries.csv",
    "boxes.csv": lambda shards: shards / "boxes.csv",
    "tar": lambda shards: shards / "train-00000.tar",
    "idx": lambda shards: shards / "train-00000.idx",
    "folder": lambda shards: shards,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_file_that_may_not_be_read_is_named(what: str, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(phantom_shards.path, tmp_path / "shards"))
    unreadable = UNREADABLE[what](shards)
    unreadable.chmod(0)
    try:
        done = python("scripts/verify_shards.py", shards, preexec_fn=without_root_rights)
    finally:
        unreadable.chmod(0o755)
    assert_one_line(done, 4, str(unreadable))


def test_control_characters_are_shown_escaped(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    assert printable("a\x1b[2J\r\x9b\u202eb\ttab\nline é") == "a\\x1b[2J\\r\\x9b\\u202eb\ttab\nline é"
    done = python("scripts/verify_shards.py", tmp_path / "a\x1b[2J\nError: b")
    assert_one_line(done, 3, "a\\x1b[2J Error: b")
    assert "\x1b" not in done.stdout + done.stderr


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(phantom_shards.path, tmp_path / "shards"))
    record = json.loads((shards / "manifest.json").read_text())
    record["findings"] = ["\x1b[2J"]
    (shards / "manifest.json").write_text(json.dumps(record))
    done = python("-m", "trainer", "--shards", shards)
    assert_one_line(done, 3)
    assert "\x1b" not in done.stdout + done.stderr


def test_ctrl_c_while_python_imports_is_one_line() -> None:
    # -v names every module on stderr as it is imported.
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", "trainer", "--dry-run"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    with process:
        for line in process.stderr:
            if "import 'torch._C'" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "stopped by SIGINT before anything was begun\n" in rest


def test_a_path_that_is_no_ascii_works_in_an_ascii_locale(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(phantom_shards.path, tmp_path / "Röntgen"))
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python("scripts/verify_shards.py", shards, env=ascii_only)
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_open_files_are_a_missing_resource_with_a_hint(verify: list[object]) -> None:
    few = (16, 16)
    done = python(*verify, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))
    assert done.returncode == 4, done.stderr
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = [
    *("-m trainer", "-m eval", "-m eval.score", "-m benchmarks.loader"),
    *(f"scripts/{name}.py" for name in ("make_phantoms", "make_shards", "verify_shards", "predict", "fetch_shards")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_help(command: str) -> None:
    done = python(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    assert "\n  --help " in done.stdout
