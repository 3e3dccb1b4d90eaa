"""What benchmarks measure of processes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELD = 2**30


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="read from /proc")
def test_the_peak_memory_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    measure = "from benchmarks.harness import peak_memory_of_this_process as peak; print(peak())"
    hold = f"import subprocess, sys; held = b'x' * {HELD}; subprocess.run([sys.executable, '-c', {measure!r}])"
    peaks = []
    for code in (hold, f"held = b'x' * {HELD}; {measure}"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[0] < HELD < peaks[1]
