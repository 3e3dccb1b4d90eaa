"""What the tests of `python -m eval.score` score."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from shards.entries import read_entries
from tests.eval.submission.scoring import predict, refused, write


@pytest.fixture(scope="session")
def metadata(nih_data: Path) -> Path:
    return nih_data / "nih_metadata" / "Data_Entry_2017_v2020.csv.gz"


@pytest.fixture(scope="session")
def entries(metadata: Path) -> pd.DataFrame:
    return read_entries(metadata).table


@pytest.fixture(scope="session")
def official(nih_data: Path, entries: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The entries of the official test list and of a val list."""
    lists = {name: nih_data / "nih_metadata" / f"{name}_list.txt" for name in ("test", "val")}
    return {name: entries[entries["image"].isin(path.read_text().split())] for name, path in lists.items()}


@pytest.fixture(scope="session")
def sample(nih_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 120 of NIH's metadata rows and predictions on them."""
    folder = tmp_path_factory.mktemp("sample")
    csv = folder / "Data_Entry_2017_v2020.csv"
    csv.write_bytes((nih_data / "nih_sample" / csv.name).read_bytes())
    write(predict(read_entries(csv).table), folder / "predictions.csv")
    return folder


@pytest.fixture
def predictions(sample: Path) -> pd.DataFrame:
    return pd.read_csv(sample / "predictions.csv")


@pytest.fixture
def score_sample(sample: Path, tmp_path: Path) -> Callable[[pd.DataFrame], str]:
    """(predictions) -> the line that refuses them."""

    def refuse(table: pd.DataFrame) -> str:
        path = write(table, tmp_path / "predictions.csv")
        line = refused(path, "--entries", sample / "Data_Entry_2017_v2020.csv")
        assert str(path) in line
        return line

    return refuse
