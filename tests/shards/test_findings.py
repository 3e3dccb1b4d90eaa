import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.findings import ALIASES, FINDINGS, canonical, to_multi_hot, to_text

some_findings = st.lists(st.sampled_from(FINDINGS), min_size=1, unique=True)


def test_there_are_14_findings_in_the_order_of_the_dataset_s_authors() -> None:
    assert len(set(FINDINGS)) == len(FINDINGS) == 14
    assert FINDINGS[:8] == (
        "Atelectasis",
        "Cardiomegaly",
        "Effusion",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pneumonia",
        "Pneumothorax",
    )


@given(some_findings)
def test_a_text_sets_its_findings_and_no_others_in_any_order(names: list[str]) -> None:
    labels = to_multi_hot("|".join(names))
    assert labels.dtype == np.uint8 and labels.shape == (14,)
    assert {FINDINGS[position] for position in np.flatnonzero(labels)} == set(names)


@given(st.lists(st.sampled_from([0, 1]), min_size=14, max_size=14))
def test_a_vector_survives_the_way_through_text(bits: list[int]) -> None:
    labels = np.array(bits, dtype=np.uint8)
    assert np.array_equal(to_multi_hot(to_text(labels)), labels)


def test_no_finding_is_the_zero_vector() -> None:
    assert not to_multi_hot("No Finding").any()
    assert to_text(np.zeros(14, dtype=np.uint8)) == "No Finding"


@pytest.mark.parametrize(("alias", "finding"), ALIASES.items())
def test_an_alias_means_its_finding(alias: str, finding: str) -> None:
    assert canonical(alias) == finding
    assert to_text(to_multi_hot(f"Mass|{alias}")) == to_text(to_multi_hot(f"Mass|{finding}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Nodul", "unknown finding 'Nodul'; the nearest valid name is 'Nodule'"),
        ("mass", "the nearest valid name is 'Mass'"),
        ("no finding", "the nearest valid name is 'No Finding'"),
        ("Mass | Mass", "'Mass' occurs twice in 'Mass | Mass'"),
        ("Mass| |Edema", "unknown finding ''"),
        ("", "unknown finding ''"),
        ("Mass|", "unknown finding ''"),
        ("No Finding|Mass", "'No Finding' beside a finding in 'No Finding|Mass'"),
        ("Mass|No Finding", "'No Finding' beside a finding"),
        ("Mass|Mass", "'Mass' occurs twice in 'Mass|Mass'"),
        ("Pleural_Thickening|Pleural Thickening", "occurs twice"),
    ],
)
def test_any_other_text_is_an_error_that_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_multi_hot(text)


@pytest.mark.parametrize("text", ["Mass| Edema", " Mass |Edema ", "Mass\t|Edema"])
def test_blanks_around_a_name_are_passed_over(text: str) -> None:
    assert np.array_equal(to_multi_hot(text), to_multi_hot("Mass|Edema"))
    assert not to_multi_hot(" No Finding ").any()
