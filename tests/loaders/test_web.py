"""The webdataset loader keeps the contract of every loader, in its own order, with real processes."""

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
import pytest
import torch

from loaders import Batch, Loader, LoaderSpec, make_loader
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.folder import ShardFolder, SplitReader, open_shards
from shards.pixels import decode_sample

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def open_loader(shards: ShardFolder, **changes: Any) -> Loader:
    options = {"split": "train", "batch_size": 16, "device": CPU, "training": True, "seed": 5, "threads": 2}
    return make_loader("webdataset", LoaderSpec(shards, **{**options, **changes}))


def epoch(loader: Loader) -> Batch:
    """One epoch as one batch."""
    return Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))


def rows_of(loader: Loader) -> list[int]:
    return [row for batch in loader for row in batch.rows.tolist()]


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = [(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def copy_with(shards: ShardFolder, folder: Path, key: str, member: str, content: bytes) -> ShardFolder:
    """Copy a shard folder, with the first bytes of a member of train-00001.tar overwritten."""
    copy = Path(shutil.copytree(shards.path, folder / "copy"))
    tar = copy / "train-00001.tar"
    (line,) = [line for line in tar.with_suffix(".idx").read_text().splitlines() if f"{key}.row" in line]
    fields = line.split()
    offset = int(fields[fields.index(member) + 1])
    data = bytearray(tar.read_bytes())
    data[offset : offset + len(content)] = content
    tar.write_bytes(data)
    return open_shards(copy)


def two_epochs_and_a_state(loader: Loader) -> tuple[list[Batch], dict[str, Any]]:
    """The batches of two epochs, and the state after three quarters of the first."""
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == loader.batches * 3 // 4:
            state = loader.state_dict()
    return [*batches, *loader], state


@pytest.fixture(scope="module")
def evaluating(phantom_shards: ShardFolder) -> Iterator[Loader]:
    """In row order, from two processes that stay for all tests of this file."""
    with open_loader(phantom_shards, training=False) as loader:
        yield loader


@pytest.fixture(scope="module")
def training(phantom_shards: ShardFolder) -> Iterator[Loader]:
    """In training order, from two processes that stay for all tests of this file."""
    with open_loader(phantom_shards, flip="random", augment="light") as loader:
        yield loader


@pytest.fixture(scope="module")
def doubling(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Both flips of a split smaller than a batch, from a folder whose name is no plain word."""
    folder = tmp_path_factory.mktemp("odd") / "pipe:touch oops; {a,b}::c %41 ${HOME} http:"
    shards = open_shards(Path(shutil.copytree(phantom_shards.path, folder)))
    with open_loader(shards, split="val", flip="both", batch_size=1000, threads=64) as loader:
        yield loader


def test_evaluation_yields_the_packed_pixels_and_labels_in_row_order(
    phantom_shards: ShardFolder, evaluating: Loader
) -> None:
    reader = SplitReader(phantom_shards, "train")
    stored = reader.read(range(len(reader)))
    batch = epoch(evaluating)
    assert batch.rows.tolist() == stored.rows.tolist()
    decoded = np.stack([decode_sample(image.tobytes(), 64) for image in stored.images])
    assert np.array_equal(batch.images[:, 0].numpy(), decoded)
    assert np.array_equal(batch.labels.numpy(), stored.labels)


def test_batches_have_the_sizes_and_types_of_the_other_loaders(phantom_shards: ShardFolder, training: Loader) -> None:
    count = phantom_shards.manifest.splits["train"].images
    batches = list(training)
    assert [len(batch.images) for batch in batches] == [16] * (count // 16) + [count % 16]
    assert (training.samples, training.batches) == (count, len(batches))
    for images, labels, rows in batches:
        assert images.shape[1:] == (1, 64, 64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.dtype, labels.dtype, rows.dtype) == (torch.uint8, torch.uint8, torch.int32)
        assert labels.shape == (len(images), 14)


def test_an_evaluation_left_early_starts_anew(phantom_shards: ShardFolder, evaluating: Loader) -> None:
    next(iter(evaluating))
    assert rows_of(evaluating) == phantom_shards.rows("train").tolist()


def test_training_sees_every_sample_once_in_another_order_each_epoch(
    phantom_shards: ShardFolder, training: Loader
) -> None:
    rows = phantom_shards.rows("train").tolist()
    orders = [rows_of(training) for _ in range(3)]
    for order in orders:
        assert sorted(order) == rows
        assert order != rows
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_epoch_left_early_goes_on_where_it_was_left(phantom_shards: ShardFolder, training: Loader) -> None:
    rows = [next(iter(training)).rows for _ in range(training.batches)]
    assert sorted(torch.cat(rows).tolist()) == phantom_shards.rows("train").tolist()
    assert list(training) == []  # all batches were handed out: here the epoch ends


def test_a_state_from_the_middle_of_an_epoch_continues_to_the_same_bits(training: Loader) -> None:
    expected, state = two_epochs_and_a_state(training)
    training.close()  # the processes that go on are others
    training.load_state_dict(state)
    assert same([*training, *training], expected[state["batch"] :])


def test_a_state_continues_to_the_same_bits_where_batches_are_skipped_undecoded(phantom_shards: ShardFolder) -> None:
    with open_loader(phantom_shards, flip="both", augment="light", threads=1, batch_size=4) as loader:
        expected, state = two_epochs_and_a_state(loader)
        assert 32 < state["batch"] * 2 < 64
        loader.load_state_dict(state)
        assert same([*loader, *loader], expected[state["batch"] :])


def test_flip_both_yields_each_image_and_its_mirror_in_one_batch(phantom_shards: ShardFolder, doubling: Loader) -> None:
    (batch,) = doubling
    once, mirrored = batch.images.chunk(2)
    assert torch.equal(once.flip(-1), mirrored)
    assert torch.equal(*batch.labels.chunk(2))
    assert torch.equal(*batch.rows.chunk(2))
    assert sorted(batch.rows.tolist()) == sorted(phantom_shards.rows("val").tolist() * 2)


def test_a_folder_of_any_name_is_a_plain_path(phantom_shards: ShardFolder, doubling: Loader) -> None:
    assert set(rows_of(doubling)) == set(phantom_shards.rows("val").tolist())


def test_there_are_no_more_processes_than_work_for_them(doubling: Loader) -> None:
    assert doubling.state_dict()["workers"] == 1  # of 64 that were asked for


@pytest.mark.parametrize("is_training", [True, False])
def test_ranks_share_the_split_and_mix_anew_every_epoch(phantom_shards: ShardFolder, is_training: bool) -> None:
    seen: list[list[list[int]]] = []
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "threads": 1, "training": is_training}
        with open_loader(phantom_shards, **options) as loader:
            seen.append([rows_of(loader) for _ in range(2)])
            assert loader.samples == len(seen[rank][0])
    for one, other in zip(*seen, strict=True):
        assert sorted(one + other) == phantom_shards.rows("train").tolist()
        assert len(one) - len(other) in (0, 1)
    if is_training:
        assert set(seen[0][0]) != set(seen[0][1])
    else:
        assert [one[0] for one in seen] == [phantom_shards.rows("train").tolist()[rank::2] for rank in (0, 1)]


def test_the_state_is_bound_to_the_number_of_processes(phantom_shards: ShardFolder) -> None:
    state = open_loader(phantom_shards, threads=2).state_dict()
    with pytest.raises(CannotResume, match="workers was 2, is now 1; --threads 2 continues it"):
        open_loader(phantom_shards, threads=1).load_state_dict(state)
    with pytest.raises(CannotResume, match="seed was 5, is now 6"):
        open_loader(phantom_shards, seed=6).load_state_dict(state)


def test_a_state_of_the_former_order_is_refused(phantom_shards: ShardFolder) -> None:
    loader = open_loader(phantom_shards, threads=1)
    state = loader.state_dict()
    del state["order"]
    with pytest.raises(CannotResume, match="orders samples differently; train under a new --name"):
        loader.load_state_dict(state)


def test_the_generator_of_the_run_is_left_alone(training: Loader) -> None:
    before = torch.random.get_rng_state()
    list(training)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_damage_is_named_with_its_shard_and_the_loader_goes_on_elsewhere(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    key = f"{phantom_shards.rows('train')[27]:08d}"
    shards = copy_with(phantom_shards, tmp_path, key, "jpg", bytes(64))
    name = rf"copy/train-00001\.tar, sample {key}"
    with open_loader(shards, threads=1) as loader:
        for _ in range(2):
            with pytest.raises(BadData, match=rf"{name} does not hold the image that was packed") as caught:
                list(loader)
            assert "\n" not in caught.value.message
        original = phantom_shards.path / "train-00001.tar"
        tar = shards.path / original.name
        for member, content, message in [
            ("row", b"\x63", rf"{name}: the shard holds row"),
            ("labels", None, rf"{name} has no intact labels"),
            ("jpg", None, rf"{name} has no intact jpg, labels, row"),
        ]:
            data = bytearray(original.read_bytes())
            fields = next(line.split() for line in original.with_suffix(".idx").read_text().splitlines() if key in line)
            offset = int(fields[fields.index(member) + 1])
            if content is None:  # without a header, what follows cannot be read either
                offset, content = offset - 512, b"\xff" * 8
            data[offset : offset + len(content)] = content
            tar.write_bytes(data)
            with pytest.raises(BadData, match=message):
                list(loader)
        tar.unlink()
        with pytest.raises(BadData, match=r"train-00001\.tar is missing; pack again"):
            list(loader)
        shutil.copy(original, tar)
        left = loader.samples - 16 * loader.state_dict()["batch"]  # batches before the damaged image count
        assert len(rows_of(loader)) == left
        assert len(rows_of(loader)) == loader.samples


def test_a_rank_without_samples_has_no_batches_and_starts_no_process(phantom_shards: ShardFolder) -> None:
    count = len(phantom_shards.rows("val"))
    before = len(multiprocessing.active_children())
    with open_loader(phantom_shards, split="val", rank=count, world_size=count + 1) as loader:
        assert (list(loader), loader.samples, loader.batches) == ([], 0, 0)
        assert len(multiprocessing.active_children()) == before


def test_a_killed_process_is_said_and_the_next_epoch_starts_new_ones(phantom_shards: ShardFolder) -> None:
    others = set(multiprocessing.active_children())
    with open_loader(phantom_shards, batch_size=4) as loader:
        next(iter(loader))
        (victim, _) = set(multiprocessing.active_children()) - others
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        with pytest.raises(ResourceMissing, match="killed") as caught:
            list(loader)
        assert "\n" not in caught.value.message
        assert set(multiprocessing.active_children()) <= others
        list(loader)
        assert len(rows_of(loader)) == loader.samples
    assert set(multiprocessing.active_children()) <= others


def test_a_command_that_never_closes_its_loader_ends_in_silence(phantom_shards: ShardFolder) -> None:
    script = f"""
if __name__ == "__main__":
    from pathlib import Path
    import torch
    from loaders import LoaderSpec, make_loader
    from shards.folder import open_shards
    spec = LoaderSpec(open_shards(Path({str(phantom_shards.path)!r})), "val", 4, torch.device("cpu"), True)
    loader = make_loader("webdataset", spec)
    batches = iter(loader)
    print(len(next(batches).rows))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "4\n", "")
