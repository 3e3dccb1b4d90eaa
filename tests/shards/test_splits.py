from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.entries import read_entries
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.splits import (
    RANDOM_FRACTIONS,
    SPLITS,
    read_list,
    split_by_lists,
    split_official,
    split_random,
    verify_disjoint,
)

# ../shared/data/README.md, in FINDINGS order.
TEST_POSITIVES = [3279, 1069, 4658, 6112, 1748, 1623, 555, 2665, 1815, 925, 1093, 435, 1143, 86]

patients_of_images = st.lists(st.integers(1, 12), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)
shares = st.floats(0, 0.49)


def entries_of(patients: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"image": [f"{n}.png" for n in range(len(patients))], "patient": patients})


def patients_in(entries: pd.DataFrame, names: np.ndarray, split: str) -> set[int]:
    return set(entries["patient"][names == split])


def official_lists(entries: pd.DataFrame) -> tuple[frozenset[str], frozenset[str]]:
    # Every third patient for test, as lists that are by patient.
    test = entries["patient"] % 3 == 0
    return frozenset(entries["image"][~test]), frozenset(entries["image"][test])


@given(patients_of_images, shares, seeds)
def test_random_never_puts_a_patient_into_two_splits_and_every_image_into_one(
    patients: list[int], share: float, seed: int
) -> None:
    entries = entries_of(patients)
    names = split_random(entries, (0.8 - share, share, 0.2), seed)
    assert set(names) <= set(SPLITS)
    found = [patients_in(entries, names, split) for split in SPLITS]
    assert sum(map(len, found)) == len(set(patients))


@given(patients_of_images, shares, seeds)
def test_random_gives_each_split_its_share_to_within_a_patient(patients: list[int], share: float, seed: int) -> None:
    names = split_random(entries_of(patients), (0.8 - share, share, 0.2), seed)
    largest = max(patients.count(patient) for patient in patients)
    for split, fraction in zip(SPLITS, (0.8 - share, share, 0.2), strict=True):
        assert abs(np.count_nonzero(names == split) - fraction * len(patients)) <= largest


@given(patients_of_images, shares, seeds)
def test_official_leaves_test_alone_and_draws_val_by_patient_with_its_share(
    patients: list[int], share: float, seed: int
) -> None:
    entries = entries_of(patients)
    train_val, test = official_lists(entries)
    names = split_official(entries, train_val, test, share, seed)
    assert set(entries["image"][names == "test"]) == test
    train, val = (patients_in(entries, names, split) for split in ("train", "val"))
    assert not train & val
    largest = max(patients.count(patient) for patient in patients)
    assert abs(np.count_nonzero(names == "val") - share * len(train_val)) <= largest / 2


@given(patients_of_images, seeds)
def test_a_split_is_a_function_of_its_seed(patients: list[int], seed: int) -> None:
    entries = entries_of(patients)
    once, again = (split_random(entries, RANDOM_FRACTIONS, seed) for _ in range(2))
    assert np.array_equal(once, again)


def test_another_seed_is_another_split() -> None:
    entries = entries_of(list(range(100)))
    one, other = (split_random(entries, RANDOM_FRACTIONS, seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(SPLITS)), min_size=1, max_size=12))
def test_the_proof_fails_exactly_where_a_patient_is_in_two_splits(rows: list[tuple[int, str]]) -> None:
    entries = entries_of([patient for patient, _ in rows])
    names = np.array([split for _, split in rows], dtype="<U5")
    twice = [patient for patient, _ in rows if len({split for other, split in rows if other == patient}) > 1]
    if not twice:
        counts = verify_disjoint(entries, names)
        assert counts == {split: len(patients_in(entries, names, split)) for split in SPLITS}
        return
    with pytest.raises(BadData, match="a split must be by patient") as error:
        verify_disjoint(entries, names)
    assert any(f"the first is patient {patient};" in error.value.message for patient in twice)


def test_three_lists_are_followed_to_the_letter() -> None:
    names = split_by_lists(
        entries_of([1, 2, 3]), frozenset({"2.png"}), frozenset({"0.png"}), frozenset({"1.png", "elsewhere.png"})
    )
    assert names.tolist() == ["val", "test", "train"]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"0.png"}, {"1.png"}, "1 images are on no list of the split, the first is 2.png"),
        ({"0.png", "1.png"}, {"1.png", "2.png"}, "image 1.png is on two lists"),
    ],
)
def test_an_image_on_no_list_or_on_two_is_named(train: set[str], test: set[str], message: str) -> None:
    with pytest.raises(BadData) as error:
        split_official(entries_of([1, 2, 3]), frozenset(train), frozenset(test), 0.1, 0)
    assert message in error.value.message


@pytest.mark.parametrize("text", ["a.png\nb.png", "a.png\nb.png\n", "\ufeffa.png\r\nb.png\r\n", "b.png\n\na.png\n"])
def test_a_list_is_read_whatever_its_line_ends_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert read_list(tmp_path / "list.txt") == {"a.png", "b.png"}


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe\xfd"], ids=["missing", "empty", "blank", "binary"])
def test_a_list_that_names_nothing_is_an_error_that_names_the_list(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "val_list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadData, match=r"val_list\.txt"):
        read_list(path)


def test_a_list_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(BadData, match=r"cannot read the list .*list\.txt has more than 67,108,864 bytes"):
        read_list(path)


@pytest.fixture(scope="module")
def nih(nih_data: Path) -> tuple[pd.DataFrame, frozenset[str], frozenset[str]]:
    """NIH's whole table with its two lists."""
    metadata = nih_data / "nih_metadata"
    lists = (read_list(metadata / f"{which}_list.txt") for which in ("train_val", "test"))
    return (read_entries(metadata).table, *lists)  # type: ignore[return-value]


def test_nih_s_own_split_has_its_published_counts_and_no_overlap(
    nih: tuple[pd.DataFrame, frozenset[str], frozenset[str]],
) -> None:
    table, train_val, test = nih
    names = split_official(table, train_val, test, 0.125, seed=0)
    count = {split: int(np.count_nonzero(names == split)) for split in SPLITS}
    assert (count["train"] + count["val"], count["test"]) == (86_524, 25_596)
    patients = verify_disjoint(table, names)
    assert (patients["train"] + patients["val"], patients["test"]) == (28_008, 2_797)
    assert table.loc[names == "test", list(FINDINGS)].to_numpy().sum(axis=0).tolist() == TEST_POSITIVES
    assert abs(count["val"] / 86_524 - 0.125) < 0.001


def test_a_published_val_list_is_patient_disjoint_with_nih_s_split(
    nih: tuple[pd.DataFrame, frozenset[str], frozenset[str]], nih_data: Path
) -> None:
    table, train_val, test = nih
    val = read_list(nih_data / "nih_metadata" / "val_list.txt")
    names = split_by_lists(table, train_val - val, val, test)
    assert np.count_nonzero(names == "val") == 11_212
    assert sum(verify_disjoint(table, names).values()) == 30_805


@pytest.mark.parametrize("seed", range(20))
def test_nih_at_random_is_70_10_20_without_overlap(
    nih: tuple[pd.DataFrame, frozenset[str], frozenset[str]], seed: int
) -> None:
    table = nih[0]
    names = split_random(table, RANDOM_FRACTIONS, seed)
    assert sum(verify_disjoint(table, names).values()) == 30_805
    shares = [np.count_nonzero(names == split) / len(table) for split in SPLITS]
    assert np.allclose(shares, RANDOM_FRACTIONS, atol=0.002)
