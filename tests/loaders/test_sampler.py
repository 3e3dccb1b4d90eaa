"""The order of every epoch: a uniform permutation, shared out among ranks, the same on a resume."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loaders.sampler import EpochSampler, epoch_flips, epoch_order
from loaders.spec import LoaderSpec
from shards.errors import CannotResume
from shards.folder import ShardFolder

CPU = torch.device("cpu")


def make_spec(shards: ShardFolder, **changes: Any) -> LoaderSpec:
    options = {"split": "train", "batch_size": 8, "device": CPU, "training": True, "seed": 3, **changes}
    return LoaderSpec(shards, **options)


def positions(sampler: EpochSampler) -> list[int]:
    return [int(position) for indices in sampler.remaining() for position in indices.positions]


def test_the_mean_displacement_is_that_of_a_uniform_permutation() -> None:
    # A third of N: the mean distance of two independent uniform places.
    n = 50_000
    displacement = np.abs(epoch_order(n, seed=1, epoch=0) - np.arange(n)).mean() / n
    assert displacement == pytest.approx(1 / 3, abs=0.01)


def test_epochs_and_seeds_have_independent_orders_and_flips() -> None:
    n = 50_000
    first = epoch_order(n, seed=1, epoch=0)
    for other in (epoch_order(n, seed=1, epoch=1), epoch_order(n, seed=2, epoch=0)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02
    flips = epoch_flips(n, seed=1, epoch=0)
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    assert np.mean(flips == epoch_flips(n, seed=1, epoch=1)) == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(first, flips)[0, 1]) < 0.02


@given(samples=st.integers(1, 200), world=st.integers(1, 5), batch=st.integers(1, 40), epoch=st.integers(0, 3))
def test_the_ranks_together_see_every_sample_once(
    phantom_shards: ShardFolder, samples: int, world: int, batch: int, epoch: int
) -> None:
    ranks = [
        EpochSampler(make_spec(phantom_shards, batch_size=batch, rank=rank, world_size=world), samples)
        for rank in range(world)
    ]
    for sampler in ranks:
        sampler.epoch = epoch
    seen = [positions(sampler) for sampler in ranks]
    assert sorted(position for mine in seen for position in mine) == list(range(samples))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert [sampler.samples for sampler in ranks] == [len(mine) for mine in seen]
    assert [sampler.batches for sampler in ranks] == [len(list(one.remaining())) for one in ranks]


def test_ranks_mix_anew_every_epoch(phantom_shards: ShardFolder) -> None:
    sampler = EpochSampler(make_spec(phantom_shards, rank=0, world_size=2), 1000)
    first = set(positions(sampler))
    sampler.next_epoch()
    assert 200 < len(first & set(positions(sampler))) < 300


def test_evaluation_is_in_row_order_and_starts_anew(phantom_shards: ShardFolder) -> None:
    sampler = EpochSampler(make_spec(phantom_shards, training=False), 20)
    sampler.advance()
    sampler.start()
    assert positions(sampler) == list(range(20))


def test_flip_both_fills_half_of_each_batch_with_mirrors(phantom_shards: ShardFolder) -> None:
    sampler = EpochSampler(make_spec(phantom_shards, flip="both"), 21)
    assert [len(indices.positions) for indices in sampler.remaining()] == [4, 4, 4, 4, 4, 1]
    assert (sampler.samples, sampler.batches) == (42, 6)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 4}),
        ("flip", {"flip": "random"}),
        ("augment", {"augment": "light"}),
        ("world_size", {"world_size": 2}),
        ("split", {"split": "val"}),
    ],
)
def test_a_state_of_another_spec_is_refused_by_name(
    phantom_shards: ShardFolder, field: str, changes: dict[str, Any]
) -> None:
    state = EpochSampler(make_spec(phantom_shards), 20).state_dict()
    with pytest.raises(CannotResume, match=f"{field} was"):
        EpochSampler(make_spec(phantom_shards, **changes), 20).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "train, val, test"),
        ({"flip": "up"}, "none, random, both"),
        ({"augment": "much"}, "none, light, strong"),
        ({"batch_size": 0}, "below 1"),
        ({"flip": "both", "batch_size": 3}, "even batch size"),
        ({"rank": 2, "world_size": 2}, "outside 0..1"),
        ({"flip": "random", "training": False}, "for training"),
        ({"augment": "light", "training": False}, "for training"),
    ],
)
def test_a_spec_that_cannot_be_kept_is_refused(
    phantom_shards: ShardFolder, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(phantom_shards, **changes)
