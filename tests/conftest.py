"""Real inputs shared by the tests: phantoms, the shards packed from them, and NIH's own files."""

import contextlib
import os
import resource
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from shards.folder import ShardFolder, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.phantoms import make_phantoms
from shards.pixels import PixelRecipe

ROOT = Path(__file__).parents[1]
GPU = os.environ.get("CXRAPID_GPU", "")
"""For tests marked cuda. 1: what would skip one fails it, so that no machine passes by skipping; cpu: they run on the
CPU as far as they can; else they are skipped where torch finds no GPU."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if GPU != "1":
        _require_gpu(item)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    # Not in the setup, where a failure would be counted as an error.
    try:
        _require_gpu(pyfuncitem)
        return (yield)
    except pytest.skip.Exception as skipped:
        if GPU == "1" and pyfuncitem.get_closest_marker("cuda"):
            pytest.fail(f"CXRAPID_GPU=1, and yet: {skipped.msg}", pytrace=False)
        raise


def _require_gpu(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and GPU != "cpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """SIGINT as in a terminal, also for what tests start: a shell has it ignored in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def nih_data() -> Path:
    """NIH's own metadata and 120 of its images; set CXRAPID_NIH_DATA to say where they are."""
    folder = Path(os.environ.get("CXRAPID_NIH_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "nih_metadata").is_dir():
        pytest.skip(f"NIH's files are not in {folder}: what holds for them is not tested here")
    return folder


@pytest.fixture(scope="session")
def phantom_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 phantoms of 128 px as an NIH tree."""
    tree = tmp_path_factory.mktemp("phantoms")
    make_phantoms(tree, images=96, size=128, seed=0)
    return tree


@pytest.fixture(scope="session")
def phantom_shards(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """The phantoms packed at 64 px, 20 to a shard, so that no split fits one shard or one batch."""
    out = tmp_path_factory.mktemp("shards")
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), out, PixelRecipe(size=64), shard_size=20)
    return open_shards(out)


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_room() -> "contextlib.AbstractContextManager[None]":
    """A `with no_room:` in which no byte can be written to a file, as on a full disk, also by root."""
    return _no_room()
