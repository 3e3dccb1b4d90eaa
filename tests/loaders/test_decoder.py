import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIImageType

import loaders.dali
import loaders.decoder
import loaders.spec
from loaders import Batch, Loader, LoaderSpec, make_loader
from loaders.decoder import Decoder, benchmark, candidates, choose_decoder, decoding_pipeline, fastest, load_or_tune
from loaders.sampler import BatchIndices
from shards.errors import CannotResume
from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample
from shards.processes import available_cores
from trainer.logging.checkpoints import require_like
from trainer.options import TrainConfig
from trainer.resolve import loader_spec


def make_spec(shards: ShardFolder, batch_size: int = 16, threads: int = 0) -> LoaderSpec:
    return LoaderSpec(shards, "train", batch_size, torch.device("cpu"), training=True, threads=threads)


def on_gpu(shards: ShardFolder, threads: int = 0) -> LoaderSpec:
    return LoaderSpec(shards, "train", 16, torch.device("cuda"), training=True, threads=threads)


def test_on_a_cpu_one_thread_more_than_cores_decodes_unless_threads_are_given(phantom_shards: ShardFolder) -> None:
    reader = SplitReader(phantom_shards, "train")
    assert choose_decoder(make_spec(phantom_shards), reader) == Decoder("cpu", available_cores() + 1)
    assert choose_decoder(make_spec(phantom_shards, threads=5), reader) == Decoder("cpu", 5)


def test_ranks_of_a_machine_share_its_cores(phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders.spec, "available_cores", lambda: 6)
    reader = SplitReader(phantom_shards, "train")
    for ranks, threads in ((1, 7), (2, 4), (4, 2), (8, 2)):
        spec = dataclasses.replace(make_spec(phantom_shards), local_world_size=ranks)
        assert choose_decoder(spec, reader) == Decoder("cpu", threads)
    with pytest.raises(ValueError, match="local world size 0 is below 1"):
        dataclasses.replace(spec, local_world_size=0)


def test_a_single_pass_on_a_gpu_has_the_same_decoder_in_every_run(phantom_shards: ShardFolder) -> None:
    spec = LoaderSpec(phantom_shards, "val", 16, torch.device("cuda"), training=False)
    assert choose_decoder(spec, SplitReader(phantom_shards, "val")) == Decoder("mixed", spec.cores + 1, 0.65)


def test_measuring_runs_each_decoder_on_the_split_and_takes_the_fastest(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.decoder, "_SECONDS", 0.1)
    rates: dict[Decoder, list[float]] = defaultdict(list)
    measured = loaders.decoder._rate

    def rate(decoder: Decoder, encoded: list[np.ndarray], spec: LoaderSpec) -> float:
        assert len(encoded) == 16 and all(bytes(image[:2]) == b"\xff\xd8" for image in encoded)
        rates[decoder].append(measured(decoder, encoded, spec))
        return rates[decoder][-1]

    monkeypatch.setattr(loaders.decoder, "_rate", rate)
    tried = [Decoder("cpu", threads) for threads in (3, 1, 2)]
    best = benchmark(make_spec(phantom_shards), SplitReader(phantom_shards, "train"), tried)
    assert list(rates) == tried and all(each > 0 for found in rates.values() for each in found)
    assert statistics.mean(rates[best]) == max(map(statistics.mean, rates.values()))


class Rates:
    """Rates of decoders by number, and a clock that a measurement moves on."""

    def __init__(self, seconds: float, *rounds: list[float]) -> None:
        self.tried = [Decoder("mixed", number) for number in range(len(rounds[0]))]
        self.measured: list[int] = []
        self._seconds, self._rounds = seconds, rounds

    def __call__(self, decoder: Decoder) -> float:
        self.measured.append(decoder.threads)
        return self._rounds[self.measured.count(decoder.threads) - 1][decoder.threads]

    def clock(self) -> float:
        return 1000 + self._seconds * len(self.measured)


def test_the_second_round_of_a_sweep_is_without_the_losers_of_the_first_and_both_count() -> None:
    rates = Rates(1.0, [50, 100, 91, 89, 96], [0, 90, 95, 0, 97])
    assert fastest(rates.tried, rates, rates.clock) == Decoder("mixed", 4)
    assert rates.measured == [0, 1, 2, 3, 4, 1, 4, 2]


def test_a_sweep_with_one_winner_has_one_round() -> None:
    rates = Rates(1.0, [50, 100, 89])
    assert fastest(rates.tried, rates, rates.clock) == Decoder("mixed", 1)
    assert rates.measured == [0, 1, 2]


def test_a_sweep_begins_no_measurement_that_would_end_after_15_seconds() -> None:
    rates = Rates(4.0, [10, 20, 30, 40, 50])
    assert fastest(rates.tried, rates, rates.clock) == Decoder("mixed", 2)
    assert rates.measured == [0, 1, 2]
    rates = Rates(4.0, [20, 20], [20, 20])
    fastest(rates.tried, rates, rates.clock)
    assert rates.measured == [0, 1, 0]
    rates = Rates(60.0, [20, 30])
    assert fastest(rates.tried, rates, rates.clock) == Decoder("mixed", 0)


def test_the_decoders_tried_are_the_cpu_and_four_shares_of_the_hardware_decoder_each_by_half_and_all_cores() -> None:
    tried = candidates(16)
    assert tried[:2] == [Decoder("cpu", 16), Decoder("cpu", 17)]
    assert [(each.threads, each.hardware_share) for each in tried[2:]] == [
        (threads, share) for threads in (8, 16) for share in (0.0, 0.12, 0.3, 0.65)
    ]
    assert len(candidates(1)) == 6


def test_dali_takes_the_options_for_a_gpu_and_they_change_no_pixel_on_a_cpu(phantom_shards: ShardFolder) -> None:
    spec = make_spec(phantom_shards)
    encoded = SplitReader(phantom_shards, "train").read(range(16)).images
    (expected,) = decoding_pipeline(lambda: encoded, spec, Decoder("cpu", 2)).run()
    options = loaders.decoder._gpu_options(Decoder("mixed", 2, 0.3), 64)
    pipeline = Pipeline(16, 2, None)
    with pipeline:
        source = fn.external_source(source=lambda: encoded, batch=True)
        pipeline.set_outputs(fn.decoders.image(source, output_type=DALIImageType.GRAY, **options))
    (images,) = pipeline.run()
    assert np.array_equal(images.as_array(), expected.as_array())
    pixels = np.stack([decode_sample(image.tobytes(), 64) for image in encoded])
    assert np.abs(expected.as_array()[..., 0].astype(int) - pixels).max() <= 1


def test_ranks_that_torchrun_starts_on_a_machine_are_those_of_the_spec(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks() -> int:
        config = TrainConfig(shards=phantom_shards.path, arch="custom_cnn")
        return loader_spec(config, phantom_shards, torch.device("cpu"), "train").local_world_size

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks() == 4


def test_a_loader_on_a_gpu_measures_once_and_its_state_names_the_decoder(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, sweeps = Decoder("mixed", 4, 0.12), []

    def sweep(*arguments: object) -> Decoder:
        sweeps.append(arguments)
        return chosen

    monkeypatch.setattr(loaders.decoder, "load_or_tune", sweep)
    monkeypatch.setattr(loaders.dali, "decoding_pipeline", build_nothing)
    loader = make_loader("dali", on_gpu(phantom_shards))
    fresh = loader.state_dict()
    assert decoder_of(loader) == decoder_of(loader) == chosen and len(sweeps) == 1
    saved = loader.state_dict()
    assert saved == {**fresh, "decoder": dataclasses.asdict(chosen)}
    require_like(saved, fresh, "state")  # as a run does with a checkpoint before it restores it

    resumed = make_loader("dali", on_gpu(phantom_shards))
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert decoder_of(resumed) == chosen and len(sweeps) == 1
    with_threads = make_loader("dali", on_gpu(phantom_shards, threads=9))
    with_threads.load_state_dict(saved)
    assert decoder_of(with_threads) == Decoder("mixed", 9, 0.12)
    begun = make_loader("dali", on_gpu(phantom_shards))
    begun.load_state_dict(fresh)  # saved before the first batch
    assert decoder_of(begun) == chosen and len(sweeps) == 2


def test_a_state_without_a_decoder_is_refused_on_a_gpu_and_is_that_of_a_cpu(phantom_shards: ShardFolder) -> None:
    state = make_loader("dali", make_spec(phantom_shards)).state_dict()
    assert "decoder" not in state
    with pytest.raises(CannotResume, match="names no decoder"):
        make_loader("dali", on_gpu(phantom_shards)).load_state_dict(state)


def test_the_images_decoded_at_once_change_no_batch_also_not_of_one_that_is_asked_for_again(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(at_once: int) -> list[tuple[torch.Tensor, ...]]:
        monkeypatch.setattr(loaders.decoder, "AT_ONCE", at_once)
        spec = dataclasses.replace(make_spec(phantom_shards), batch_size=8, flip="random", seed=3)
        with make_loader("dali", spec) as loader:
            two_epochs = [batch for _ in range(2) for batch in loader]
            # A state of two batches before, in the same run; the batch is changed by who has it.
            iteration, again = iter(loader), []
            saved = loader.state_dict()
            for batch in itertools.islice(iteration, 3):
                again.append(Batch(*(tensor.clone() for tensor in batch)))
                batch.images.zero_()
            loader.load_state_dict(saved)
            again += list(itertools.islice(loader, 3))
        for first, second in zip(again[:3], again[3:], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        return two_epochs + again

    one_by_one, fives = batches(8), batches(44)
    assert len(one_by_one) == len(fives) > 2 * 5
    for first, second in zip(one_by_one, fives, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_torch_keeps_its_threads_for_a_batch_that_goes_to_a_gpu(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    samples = SplitReader(phantom_shards, "train").read(range(4))
    indices = BatchIndices(np.arange(4), 2, None)
    for device, set_to in (("meta", []), ("cpu", [1, torch.get_num_threads()])):  # any that is no CPU
        spec = dataclasses.replace(make_spec(phantom_shards), device=torch.device(device), flip="random")
        decoded = torch.empty(4, 64, 64, 1, dtype=torch.uint8, device=device)
        loader = loaders.dali.DaliLoader(spec)
        batch = loader._collated(loaders.dali._Decoded(0, 0, indices, decoded, samples.labels, samples.rows))
        assert batch.images.shape == (4, 1, 64, 64) and batch.images.device.type == device
        assert counts == set_to


class BuiltError(Exception):
    """Raised in place of building a pipeline, which needs a GPU, with the decoder it would have."""


def build_nothing(source: object, spec: LoaderSpec, decoder: Decoder) -> None:
    raise BuiltError(decoder)


def decoder_of(loader: Loader) -> Decoder:
    with pytest.raises(BuiltError) as built:
        next(iter(loader))
    decoder: Decoder = built.value.args[0]
    return decoder


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
