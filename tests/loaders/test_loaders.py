"""The contract of every loader, tested on real shards from outside."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import Batch, Loader, LoaderSpec, make_loader
from shards.errors import BadData, CannotResume
from shards.findings import FINDINGS
from shards.folder import ShardFolder, SplitReader, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe, decode_sample

CPU = torch.device("cpu")
# Those that work in this process; the others have tests of their own.
IN_PROCESS = ("auto", "dali", "resident")


def open_loader(shards: ShardFolder, name: str = "dali", **changes: Any) -> Loader:
    options = {"split": "train", "batch_size": 16, "device": CPU, "training": True, "seed": 5, **changes}
    return make_loader(name, LoaderSpec(shards, **options))


def epoch(loader: Loader) -> Batch:
    """One epoch as one batch."""
    return Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))


def pillow_pixels(shards: ShardFolder, split: str) -> dict[int, np.ndarray]:
    pixels = {}
    for shard in shards.manifest.shards_of(split):
        with tarfile.open(shards.path / shard.name) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    pixels[int(member.name[:8])] = np.asarray(Image.open(io.BytesIO(file.read())))
    return pixels


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_yields_the_packed_pixels_and_labels_in_row_order(phantom_shards: ShardFolder, split: str) -> None:
    with open_loader(phantom_shards, split=split, training=False) as loader:
        batch = epoch(loader)
    expected = pillow_pixels(phantom_shards, split)
    assert batch.rows.tolist() == phantom_shards.rows(split).tolist() == sorted(expected)
    decoded = np.stack([expected[row] for row in batch.rows.tolist()])
    assert np.abs(batch.images[:, 0].numpy().astype(int) - decoded).max() <= 1
    labels = phantom_shards.entries.loc[batch.rows.tolist(), list(FINDINGS)].to_numpy()
    assert np.array_equal(batch.labels.numpy(), labels)


@pytest.mark.parametrize("name", [*IN_PROCESS, "synthetic"])
def test_batches_are_uint8_channels_last_and_the_last_is_short(phantom_shards: ShardFolder, name: str) -> None:
    with open_loader(phantom_shards, name, batch_size=16) as loader:
        batches = list(loader)
    count = phantom_shards.manifest.splits["train"].images
    assert count % 16
    assert [len(batch.images) for batch in batches] == [16] * (count // 16) + [count % 16]
    assert (loader.samples, loader.batches) == (count, len(batches))
    for batch in batches:
        assert batch.images.shape[1:] == (1, 64, 64)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.images.dtype, batch.labels.dtype, batch.rows.dtype) == (torch.uint8, torch.uint8, torch.int32)
        assert batch.labels.shape == (len(batch.images), 14)


def test_training_sees_every_sample_once_in_another_order_each_epoch(phantom_shards: ShardFolder) -> None:
    rows = phantom_shards.rows("train").tolist()
    with open_loader(phantom_shards) as loader:
        orders = [epoch(loader).rows.tolist() for _ in range(3)]
    for order in orders:
        assert sorted(order) == rows
        assert order != rows
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_random_flips_mirror_about_half_of_the_images_exactly(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards) as plain, open_loader(phantom_shards, flip="random") as flipped:
        batches = list(zip(plain, flipped, strict=True))
    mirrors = []
    for one, other in batches:  # the same samples, the mirrored ones first
        images, found = one.images[one.rows.argsort()], other.images[other.rows.argsort()]
        assert torch.equal(one.rows.sort().values, other.rows.sort().values)
        same = (images == found).flatten(1).all(1)
        mirrors.append((images.flip(-1) == found).flatten(1).all(1))
        assert bool((same ^ mirrors[-1]).all())
    mirrored = torch.cat(mirrors)
    assert 0.25 < float(mirrored.float().mean()) < 0.75


def test_flip_both_yields_each_image_and_its_mirror_in_every_epoch(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards, flip="both") as loader:
        batches = list(loader)
    for batch in batches:
        images, mirrors = batch.images.chunk(2)
        assert torch.equal(images.flip(-1), mirrors)
        assert torch.equal(*batch.labels.chunk(2))
        assert torch.equal(*batch.rows.chunk(2))
    rows = torch.cat([batch.rows for batch in batches]).tolist()
    assert sorted(rows) == sorted(phantom_shards.rows("train").tolist() * 2)


@pytest.mark.parametrize(
    ("flip", "augment"), [("none", "none"), ("random", "none"), ("both", "light"), ("random", "strong")]
)
@pytest.mark.parametrize("name", [*IN_PROCESS, "synthetic"])
def test_a_state_from_the_middle_of_an_epoch_continues_to_the_same_bits(
    phantom_shards: ShardFolder, name: str, flip: str, augment: str
) -> None:
    changes = {"flip": flip, "augment": augment}
    with open_loader(phantom_shards, name, **changes) as undisturbed:
        list(undisturbed)
        expected = [*undisturbed, *undisturbed]
    with open_loader(phantom_shards, name, **changes) as killed:
        list(killed)
        for taken, _ in enumerate(killed, 1):
            if taken == 2:
                break
        state = killed.state_dict()
    with open_loader(phantom_shards, name, **changes) as resumed:
        resumed.load_state_dict(state)
        found = [*resumed, *resumed]
    assert len(found) == len(expected) - 2
    for one, other in zip(expected[2:], found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_left_early_goes_on_where_it_was_left(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards, batch_size=8) as loader:
        rows = [next(iter(loader)).rows for _ in range(3)]
        rows += [batch.rows for batch in loader]
    assert sorted(torch.cat(rows).tolist()) == phantom_shards.rows("train").tolist()


def test_an_evaluation_left_early_starts_anew(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards, training=False) as loader:
        next(iter(loader))
        assert epoch(loader).rows.tolist() == phantom_shards.rows("train").tolist()


@pytest.mark.parametrize("name", IN_PROCESS)
def test_batches_that_are_kept_stay_as_they_were_yielded(phantom_shards: ShardFolder, name: str) -> None:
    with open_loader(phantom_shards, name, batch_size=8, flip="random") as loader:
        kept = [(batch, batch.images.clone()) for _ in range(4) for batch in loader]
    assert len(kept) > 20
    assert all(torch.equal(batch.images, as_yielded) for batch, as_yielded in kept)


def test_two_ranks_share_the_split(phantom_shards: ShardFolder) -> None:
    seen = []
    for rank in range(2):
        with open_loader(phantom_shards, rank=rank, world_size=2) as loader:
            seen += epoch(loader).rows.tolist()
    assert sorted(seen) == phantom_shards.rows("train").tolist()


def test_a_batch_may_be_larger_than_the_split(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards, split="val", batch_size=1000) as loader:
        assert [sorted(batch.rows.tolist()) for batch in loader] == [phantom_shards.rows("val").tolist()]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_rank_may_have_one_sample_or_none(phantom_shards: ShardFolder, name: str) -> None:
    samples = phantom_shards.manifest.splits["train"].images
    for world_size, sizes in ((samples, [1]), (samples + 1, [])):
        with open_loader(phantom_shards, name, rank=world_size - 1, world_size=world_size) as loader:
            for _ in range(2):
                assert [len(batch.rows) for batch in loader] == sizes


@pytest.mark.parametrize("name", IN_PROCESS)
def test_png_shards_yield_the_very_pixels_that_were_packed(phantom_tree: Path, tmp_path: Path, name: str) -> None:
    pack(make_plan(phantom_tree, SplitRecipe()), tmp_path / "png", PixelRecipe(48, "png"), shard_size=20)
    shards = open_shards(tmp_path / "png")
    reader = SplitReader(shards, "val")
    expected = [decode_sample(image.tobytes(), 48) for image in reader.read(range(len(reader))).images]
    with open_loader(shards, name, split="val", training=False) as loader:
        assert np.array_equal(epoch(loader).images[:, 0].numpy(), np.stack(expected))


def test_a_state_may_be_loaded_while_batches_are_under_way_and_two_loaders_take_turns(
    phantom_shards: ShardFolder,
) -> None:
    with open_loader(phantom_shards) as train, open_loader(phantom_shards, split="val", training=False) as val:
        start = train.state_dict()
        first = [next(iter(train)) for _ in range(3)]
        val_rows = [batch.rows for batch in val]
        train.load_state_dict(start)
        again = [batch for batch, _ in zip(train, val, strict=False)]
        assert torch.equal(torch.cat(val_rows), epoch(val).rows)
    for one, other in zip(first, again, strict=False):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.images, other.images)


def test_a_state_of_other_shards_is_refused(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards) as loader, pytest.raises(CannotResume, match="manifest was"):
        loader.load_state_dict({**loader.state_dict(), "manifest": "0" * 64})


def test_an_image_that_does_not_decode_is_named_with_its_shard(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(phantom_shards.path, tmp_path / "copy"))
    reader = SplitReader(phantom_shards, "train")
    start = int(reader._places[7, 0, 0])
    tar = copy / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    content[start : start + 64] = bytes(64)
    tar.write_bytes(content)
    with open_loader(open_shards(copy)) as loader, pytest.raises(BadData, match=r"train-00000\.tar, sample 00000007"):
        list(loader)


def test_a_shard_with_its_samples_moved_is_named(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(phantom_shards.path, tmp_path / "copy"))
    tar = copy / "train-00000.tar"
    (line,) = [line for line in tar.with_suffix(".idx").read_text().splitlines() if line.endswith("00000003.row")]
    offset = int(line.split()[-3])
    content = bytearray(tar.read_bytes())
    content[offset] = 99
    tar.write_bytes(content)
    with open_loader(open_shards(copy)) as loader, pytest.raises(BadData, match=r"sample 00000003.* holds row 99"):
        list(loader)


def test_an_unknown_loader_lists_the_known_ones(phantom_shards: ShardFolder) -> None:
    with pytest.raises(ValueError, match="auto, dali, resident"):
        open_loader(phantom_shards, "ffcv")
