"""The loader that keeps the split in memory, and what `auto` chooses."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loaders.memory
import loaders.registry
from loaders import Batch, Loader, LoaderSpec, choose_loader, make_loader
from loaders.resident import SHARE, ResidentLoader, resident_device
from shards.errors import ResourceMissing
from shards.folder import ShardFolder


def make_spec(shards: ShardFolder, **changes: Any) -> LoaderSpec:
    options = {"split": "train", "batch_size": 16, "training": True, "seed": 5, "flip": "random", **changes}
    return LoaderSpec(shards, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_two_epochs_are_those_of_dali_to_the_bit(phantom_shards: ShardFolder, augment: str) -> None:
    spec = make_spec(phantom_shards, augment=augment)
    with make_loader("dali", spec) as dali, make_loader("resident", spec) as resident:
        for one, other in zip([*dali, *dali], [*resident, *resident], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_ranks_of_a_machine_decode_once_and_leave_nothing_behind(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.memory, "_folder", lambda: tmp_path)
    decoded = []

    def decoding(spec: LoaderSpec) -> Loader:
        decoded.append(spec.split)
        return make_loader("dali", spec)

    def epoch(loader: ResidentLoader) -> list[Batch]:
        return list(loader)

    ranks = [ResidentLoader(make_spec(phantom_shards, rank=rank, world_size=2), decoding) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        batches = [batch for seen in pool.map(epoch, ranks) for batch in seen]
    assert decoded == ["train"]
    rows = torch.cat([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == phantom_shards.rows("train").tolist()
    (kept,) = tmp_path.glob(f"cxrapid-{os.getuid()}-*")
    assert kept.stat().st_size == len(rows) * 64 * 64 + 1
    for rank in ranks:
        rank.close()
    assert not kept.exists()


def test_auto_takes_resident_where_it_fits_and_says_the_figures(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(phantom_shards)
    needed = phantom_shards.manifest.splits["train"].images * 64 * 64
    name, why = choose_loader(spec)
    assert name == "resident" and "GiB" in why
    monkeypatch.setattr(loaders.memory, "free_memory", lambda device: int(needed / SHARE) - 8)
    name, why = choose_loader(spec)
    assert name == "dali" and "decoded anew" in why
    assert resident_device(spec)[0] is None
    with pytest.raises(ResourceMissing, match=r"no room: .* train split .*--loader dali"):
        make_loader("resident", spec)


def test_auto_says_what_it_took_where_dali_is_not_installed(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(loaders.registry, "_has_dali", lambda: False)
    name, why = choose_loader(make_spec(phantom_shards))
    assert name == "dataloader" and "DALI, which cannot be imported" in why


def test_a_split_smaller_than_a_batch_is_one_batch(phantom_shards: ShardFolder) -> None:
    spec = make_spec(phantom_shards, split="val", batch_size=1000)
    with make_loader("resident", replace(spec, flip="both")) as loader:
        (batch,) = loader
    assert len(batch.images) == 2 * phantom_shards.manifest.splits["val"].images


def test_fifty_epochs_take_no_more_memory_and_files(phantom_shards: ShardFolder) -> None:
    def held() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    for name in ("dali", "resident"):
        spec = make_spec(phantom_shards, flip="both", augment="light")
        with (
            make_loader(name, spec) as loader,
            make_loader(name, make_spec(phantom_shards, split="val", training=False, flip="none")) as val,
        ):
            for epoch in range(50):
                for _ in loader:
                    pass
                next(iter(val))  # left early, every time
                if epoch == 9:
                    memory, files = held()
            assert held()[0] - memory < 16 << 20
            assert held()[1] <= files
