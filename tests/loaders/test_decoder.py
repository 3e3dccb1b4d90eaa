from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import loaders.decoder
from loaders.decoder import Decoder, benchmark, choose_decoder, load_or_tune
from loaders.spec import LoaderSpec
from shards.folder import ShardFolder, SplitReader
from shards.processes import available_cores


def make_spec(shards: ShardFolder, batch_size: int = 16, threads: int = 0) -> LoaderSpec:
    return LoaderSpec(shards, "train", batch_size, torch.device("cpu"), training=True, threads=threads)


def test_on_a_cpu_one_thread_more_than_cores_decodes_unless_threads_are_given(phantom_shards: ShardFolder) -> None:
    reader = SplitReader(phantom_shards, "train")
    assert choose_decoder(make_spec(phantom_shards), reader) == Decoder("cpu", available_cores() + 1)
    assert choose_decoder(make_spec(phantom_shards, threads=5), reader) == Decoder("cpu", 5)


def test_measuring_runs_each_decoder_on_the_split_and_takes_the_fastest(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.decoder, "_SECONDS", 0.1)
    rates: dict[Decoder, float] = {}
    measured = loaders.decoder._rate

    def rate(decoder: Decoder, encoded: list[np.ndarray], device: torch.device) -> float:
        assert len(encoded) == 16 and all(bytes(image[:2]) == b"\xff\xd8" for image in encoded)
        rates[decoder] = measured(decoder, encoded, device)
        return rates[decoder]

    monkeypatch.setattr(loaders.decoder, "_rate", rate)
    tried = [Decoder("cpu", threads) for threads in (3, 1, 2)]
    best = benchmark(make_spec(phantom_shards), SplitReader(phantom_shards, "train"), tried)
    assert list(rates) == tried and all(each > 0 for each in rates.values())
    assert rates[best] == max(rates.values())


def test_a_choice_is_made_once_for_a_machine_a_shard_folder_and_a_batch_size(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[int] = []
    tried = [Decoder("cpu", 1), Decoder("cpu", 2)]

    def best_of(spec: LoaderSpec) -> Decoder:
        def choose(offered: Sequence[Decoder]) -> Decoder:
            asked.append(spec.batch_size)
            return offered[1]

        return load_or_tune(spec, tried, choose)

    assert best_of(make_spec(phantom_shards)) == best_of(make_spec(phantom_shards)) == tried[1]
    assert asked == [16]
    best_of(make_spec(phantom_shards, batch_size=8))
    assert asked == [16, 8]
    for path in (tmp_path / "cxrapid").glob("*.json"):
        path.write_text("{")  # a damaged memory is measured anew
    assert best_of(make_spec(phantom_shards)) == tried[1]
    assert asked == [16, 8, 16]
