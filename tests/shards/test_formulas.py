"""Text that a spreadsheet would calculate: escaped in files, and the same text again when it is read."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.predict.predictions import Predictions
from eval.result_files import write_table
from shards.csv_tables import escape_formulas, unescape_formulas
from shards.findings import FINDINGS
from shards.folder import open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.verification import verify_shards

MakeTree = Callable[..., Path]
NAMES = {"00000001_000.png": "=1+1.png", "00000002_000.png": "@x.png", "00000004_000.png": "+x.png"}
NAMES |= {"00000005_000.png": "'-x.png", "00000003_000.png": "-2.png", "00000006_000.png": "\tx.png"}


@given(st.lists(st.text(st.sampled_from("'=+-@\tab1.")), min_size=1))
def test_every_text_comes_back_and_none_begins_a_formula(texts: list[str]) -> None:
    table = pd.DataFrame({"image": texts, "share": -0.5})
    escaped = escape_formulas(table)
    assert not escaped["image"].str.match(r"[=+\-@\t\r]").any()
    assert unescape_formulas(escaped)["image"].tolist() == texts
    assert (escaped["share"] == -0.5).all()


def test_ordinary_text_is_written_as_it_is() -> None:
    texts = ["00000001_000.png", "F", "PA", "", "O'Neil", "'quoted'", "images_001/images"]
    assert escape_formulas(pd.DataFrame({"text": texts}))["text"].tolist() == texts


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    """A tree with images, a sex and a view that begin as formulas do."""
    tree = make_tree()
    for path in [*tree.glob("*.csv"), *tree.glob("*_list.txt")]:
        text = path.read_text()
        for old, new in NAMES.items():
            # A list of names has one a word, so a blank at the start of a name is not of it.
            text = text.replace(old, new)
        path.write_text(text.replace(",F,PA,", ",-F,=HYPERLINK(1),"))
    for old, new in NAMES.items():
        (path,) = tree.rglob(old)
        path.rename(path.with_name(new))
    return tree


def cells(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [cell for row in csv.reader(file) for cell in row]


def begins_a_formula(cell: str) -> bool:
    return cell[:1] in tuple("=+@\t\r") or (cell[:1] == "-" and not cell[1:].replace(".", "").isdigit())


def test_what_is_packed_predicted_and_reported_begins_no_formula_and_is_read_back(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (path,) = tree.rglob("@x.png")
    path.write_bytes(b"")
    plan = make_plan(tree, SplitRecipe("random"))
    pack(plan, out, PixelRecipe(16), max_rejects=1)
    assert not [cell for name in ("entries.csv", "rejects.csv") for cell in cells(out / name) if begins_a_formula(cell)]
    shards = open_shards(out)
    assert set(NAMES.values()) - {"@x.png"} <= set(shards.entries["image"])
    assert set(shards.entries["sex"]) == {"-F"} and set(shards.entries["view"]) == {"=HYPERLINK(1)"}
    assert verify_shards(out).faults == ()
    pack(plan, out, PixelRecipe(16), max_rejects=1)  # the same images as before

    rows = shards.entries.index.to_numpy(dtype=np.int32)
    hot = shards.entries[list(FINDINGS)].to_numpy(dtype=np.uint8)
    patients = shards.entries["patient"].to_numpy(dtype=np.int64)
    text = Predictions(rows, hot, hot.astype(np.float32), patients).to_csv(shards)
    (tmp_path / "p.csv").write_text(text)
    assert not [cell for cell in cells(tmp_path / "p.csv") if begins_a_formula(cell)]
    assert np.array_equal(Predictions.from_csv(tmp_path / "p.csv", shards).rows, rows)

    write_table(tmp_path / "t.csv", pd.DataFrame({"group": ["=1", "PA"], "gap": [-0.5, 1]}), index=False)
    assert (tmp_path / "t.csv").read_text() == "group,gap\n'=1,-0.5\nPA,1.0\n"
