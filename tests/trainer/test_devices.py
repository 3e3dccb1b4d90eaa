"""Setting this process up for its device."""

import platform
import subprocess
import sys

import pytest
import torch

from tests.trainer.running import ROOT
from trainer.devices import use_device

# Blocks of 64 MB, taken and freed, and how many pages the kernel had to provide for them.
REUSE = """
import resource, sys
import torch
from trainer.devices import use_device
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take():
    before = faults()
    for _ in range(8):
        torch.ones(2**24)
    return faults() - before
take()
before = take()
use_device("cpu")
take()
print(before, take())
"""


def test_a_gpu_becomes_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert use_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_on_a_cpu_memory_that_was_freed_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", REUSE], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 4
