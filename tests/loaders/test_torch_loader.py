"""The DataLoader loader: the same batches as DALI's, whatever its processes do or suffer.

WorkerPool take seconds to start, so the tests share a loader where they can.
"""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from loaders import Batch, Loader, LoaderSpec, make_loader
from shards.errors import BadData, ResourceMissing
from shards.files import sha256_of
from shards.findings import FINDINGS
from shards.folder import ShardFolder, SplitReader, open_shards
from shards.manifest import NAME, read_manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe, decode_sample
from shards.processes import available_cores

ROOT = Path(__file__).parents[2]


def open_loader(shards: ShardFolder, name: str = "dataloader", **changes: Any) -> Loader:
    options: dict[str, Any] = {"split": "train", "batch_size": 4, "training": True, "seed": 5, "threads": 1}
    return make_loader(name, LoaderSpec(shards, device=torch.device("cpu"), **{**options, **changes}))


@pytest.fixture(scope="module")
def loader(phantom_shards: ShardFolder) -> Iterator[Loader]:
    """Two workers, where there are two cores; every test takes it to a place of its own."""
    with open_loader(phantom_shards, threads=min(2, available_cores()), flip="random") as opened:
        yield opened


def at(loader: Loader, epoch: int, batch: int = 0) -> Loader:
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": batch})
    return loader


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_are_those_of_dali_in_the_same_order_with_the_same_flips(
    phantom_shards: ShardFolder, loader: Loader
) -> None:
    found = [*at(loader, 0), *loader]
    with open_loader(phantom_shards, "dali", flip="random") as dali:
        expected = [*dali, *dali]
    assert (loader.samples, loader.batches) == (dali.samples, dali.batches)
    assert len(found) == len(expected) == 2 * loader.batches
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.labels, other.labels)
        assert (one.images.int() - other.images.int()).abs().max() <= 1
        assert one.images.is_contiguous(memory_format=torch.channels_last)
    assert loader.state_dict() == dali.state_dict()


def test_a_resume_in_the_middle_of_an_epoch_with_other_workers_gives_the_same_bits(
    phantom_shards: ShardFolder, loader: Loader
) -> None:
    expected = [*at(loader, 3), *loader]
    batches = iter(at(loader, 3))
    next(batches), next(batches)
    state = loader.state_dict()
    with open_loader(phantom_shards, flip="random") as resumed:
        resumed.load_state_dict(state)
        assert_same([*resumed, *resumed], expected[2:])


def test_an_epoch_left_early_goes_on_where_it_was_left(loader: Loader) -> None:
    expected = list(at(loader, 7))
    at(loader, 7)
    assert_same([next(iter(loader)) for _ in range(2)] + list(loader), expected)


def test_nothing_decoded_ahead_for_an_epoch_left_early_is_handed_out_later(loader: Loader) -> None:
    expected = list(at(loader, 9))
    next(iter(at(loader, 8)))
    assert_same(list(at(loader, 9)), expected)


def test_evaluation_yields_the_packed_pixels_and_labels_in_row_order_and_starts_anew(
    phantom_tree: Path, tmp_path: Path
) -> None:
    # PNG, so that pixels agree exactly; JPEG's are compared with DALI's.
    pack(make_plan(phantom_tree, SplitRecipe()), tmp_path, PixelRecipe(64, "png"), shard_size=20)
    shards = open_shards(tmp_path)
    generator = torch.get_rng_state()
    with open_loader(shards, training=False) as loader:
        next(iter(loader))
        batch = Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))
    rows = shards.rows("train")
    assert batch.rows.tolist() == rows.tolist()
    encoded = SplitReader(shards, "train").read(range(len(rows))).images
    assert np.array_equal(batch.images[:, 0], np.stack([decode_sample(image.tobytes(), 64) for image in encoded]))
    assert np.array_equal(batch.labels, shards.entries.loc[rows, list(FINDINGS)])
    assert torch.equal(torch.get_rng_state(), generator), "a run's own random numbers were drawn"


def test_a_rank_has_the_samples_that_dali_has_for_it_even_in_one_batch(phantom_shards: ShardFolder) -> None:
    options: dict[str, Any] = {"batch_size": 1000, "rank": 1, "world_size": 2}
    with open_loader(phantom_shards, **options) as loader, open_loader(phantom_shards, "dali", **options) as dali:
        (batch,), (expected,) = loader, dali
    assert torch.equal(batch.rows, expected.rows)


def test_an_image_that_does_not_decode_is_named_and_no_worker_is_left(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(phantom_shards.path, tmp_path / "copy"))
    start = SplitReader(phantom_shards, "train")._places[7, 0, 0]  # of the image of sample 7
    with (copy / "train-00000.tar").open("r+b") as tar:
        tar.seek(start)
        tar.write(bytes(64))
    # As a folder from before entries.csv had them, without the CRC-32 that tells before anything decodes.
    table = pd.read_csv(copy / "entries.csv", dtype=str, keep_default_na=False).drop(columns="packed_crc32")
    table.to_csv(copy / "entries.csv", index=False)
    manifest = dataclasses.replace(read_manifest(copy), entries_sha256=sha256_of(copy / "entries.csv"))
    (copy / NAME).write_text(manifest.to_json())
    before = set(multiprocessing.active_children())
    with open_loader(open_shards(copy)) as loader:
        with pytest.raises(BadData) as caught:
            list(loader)
        assert len(multiprocessing.active_children()) == len(before) + 1
    assert set(multiprocessing.active_children()) <= before
    assert caught.value.message == f"{copy / 'train-00000.tar'}, sample 00000007 does not decode; pack again"


def test_a_process_that_never_closes_its_loader_ends_cleanly(phantom_shards: ShardFolder) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from loaders import LoaderSpec, make_loader\n"
        "from shards.folder import open_shards\n"
        "shards = open_shards(Path(sys.argv[1]))\n"
        "loader = make_loader('dataloader', LoaderSpec(shards, 'train', 8, torch.device('cpu'), True))\n"
        "batches = iter(loader)\n"
        "print(len(next(batches).rows))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(phantom_shards.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_a_killed_worker_is_one_line_and_no_other_is_left(loader: Loader) -> None:
    batches = iter(at(loader, 11))
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ResourceMissing, match=r"^a process of the loader dataloader was killed"):
        list(batches)
    assert multiprocessing.active_children() == []
    assert loader.state_dict()["batch"] > 0
