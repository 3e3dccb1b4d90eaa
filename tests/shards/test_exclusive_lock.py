import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import ResourceMissing
from shards.files import exclusive_lock

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from shards.files import exclusive_lock\n"
    "with exclusive_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.readline()\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of `tmp_path` until it reads a line, or is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_where_another_command_works_is_refused_at_once(
    holder: "subprocess.Popen[str]", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResourceMissing, match="another command is at work in"), exclusive_lock(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_who_waits_says_so_and_goes_on_when_the_other_ends(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    code = HOLD.replace("])):", "]), wait=60):")
    waiting = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    said = waiting.stderr.readline()
    assert said == f"waiting up to 60 s for another command at work in {tmp_path}\n"
    assert waiting.poll() is None
    holder.kill()
    assert waiting.communicate("\n") == ("held\n", "")
    assert waiting.returncode == 0


def test_waiting_ends_in_an_error_that_names_the_folder(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceMissing, match=f"still at work in {tmp_path} after 0.2 s; run this one again"),
        exclusive_lock(tmp_path, wait=0.2),
    ):
        pass
