import os
import subprocess
import sys

from benchmarks.harness import usage_of


def test_a_process_is_counted_with_its_children() -> None:
    code = (
        "held = bytearray(b'1' * (64 << 20)); import time\n"
        "while time.process_time() < 1: pass\n"
        "print(flush=True); input()"
    )
    before = usage_of(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    during, alone = usage_of(os.getpid()), usage_of(child.pid)
    child.communicate("\n")
    assert 0.9 < alone.cpu_seconds < 3
    assert alone.cpu_seconds <= during.cpu_seconds - before.cpu_seconds + 0.05
    assert 64 << 20 < alone.memory <= during.memory
    # When it has ended, what it used is still counted, what it held is not.
    after = usage_of(os.getpid())
    assert after.cpu_seconds >= during.cpu_seconds
    assert after.memory < during.memory - (32 << 20)
