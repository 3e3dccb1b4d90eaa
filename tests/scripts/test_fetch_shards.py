"""`python scripts/fetch_shards.py` as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from scripts.fetch_shards import main
from shards.folder import ShardFolder

ROOT = Path(__file__).parents[2]
TIMEOUT = 120


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
        (["http://127.0.0.1:1", "dest"], 4, "the same command goes on"),
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
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "pip install -e '.[fetch]'" in done.stderr.splitlines()[-1]
