import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import ResourceMissing
from shards.processes import map_in_processes

ROOT = Path(__file__).parents[2]
TIMEOUT = 300


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_every_task_comes_back_with_its_result_in_order(jobs: int) -> None:
    assert list(map_in_processes(abs, [-3, -1, -2], jobs)) == [(-3, 3), (-1, 1), (-2, 2)]


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        dict(map_in_processes(int, ["1", "one"], 2))


def test_a_worker_that_is_killed_is_exit_4_with_a_way_out() -> None:
    with pytest.raises(ResourceMissing, match=r"a worker process was killed .* --jobs 1"):
        dict(map_in_processes(os._exit, [9, 9], 2))


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import time\n"
        "from shards.processes import map_in_processes\n"
        f"for _ in map_in_processes(time.sleep, [0, {10 * TIMEOUT}, {10 * TIMEOUT}], 2):\n"
        "    print('begun', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    # The workers have the other end of the pipe: it closes with the last of them.
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL
