"""`python -m eval` and prediction on damaged files of a run: one line and exit 3, or made anew."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from scripts.predict import main as predict_command
from shards.files import sha256_of
from tests.eval.commanding import NUMBERS, expect_refusal, score, succeed
from trainer.model_file import read_header

DEEP = "[" * 1_000_000


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length])), content[8 + length :]


def with_header(path: Path, header: str, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


METADATA_FAULTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "no metadata": lambda meta: None,
    "other text": lambda meta: "no JSON",
    "nested": lambda meta: DEEP,
    "a list": lambda meta: "[]",
    "no arch": lambda meta: json.dumps({key: meta[key] for key in meta if key != "arch"}),
    "an unknown arch": lambda meta: json.dumps({**meta, "arch": "resnet5000"}),
    "arch as a number": lambda meta: json.dumps({**meta, "arch": 5}),
    "size in words": lambda meta: json.dumps({**meta, "size": "64"}),
    "a huge size": lambda meta: json.dumps({**meta, "size": 10**9}),
    "a negative size": lambda meta: json.dumps({**meta, "size": -1}),
    "an infinite size": lambda meta: json.dumps({**meta, "size": 0}).replace('"size": 0', '"size": 1e999'),
    "a small size": lambda meta: json.dumps({**meta, "size": 3}),
    "findings as a number": lambda meta: json.dumps({**meta, "findings": 5}),
    "findings of numbers": lambda meta: json.dumps({**meta, "findings": [1] * 14}),
    "other findings": lambda meta: json.dumps({**meta, "findings": meta["findings"][::-1]}),
    "no manifest": lambda meta: json.dumps({**meta, "manifest_sha256": None}),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_damaged_metadata_of_a_model_is_one_line(changeable: Path, image: Path, fault: str) -> None:
    path = changeable / "small" / "model.safetensors"
    header, data = header_of(path)
    text = METADATA_FAULTS[fault](json.loads(header["__metadata__"]["cxrapid"]))
    header["__metadata__"] = {} if text is None else {"cxrapid": text}
    with_header(path, json.dumps(header), data)
    expect_one_line_of(path, image)


TENSOR_FAULTS: dict[str, dict[str, Any]] = {
    "an unknown type": {"dtype": "F7"},
    "another type": {"dtype": "F16"},
    "type as a number": {"dtype": 5},
    "a negative shape": {"shape": [-1, -64]},
    "a huge shape": {"shape": [2**62, 2**62]},
    "a long shape": {"shape": [2] * 100_000},
    "a shape of fractions": {"shape": [1.5]},
    "shape as text": {"shape": "32"},
    "another shape": {"shape": [1, 32]},
    "offsets beyond the file": {"data_offsets": [0, 2**62]},
    "negative offsets": {"data_offsets": [-64, 0]},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "no offsets": {"data_offsets": None},
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_damaged_table_of_tensors_is_one_line(changeable: Path, image: Path, fault: str) -> None:
    path = changeable / "small" / "model.safetensors"
    header, data = header_of(path)
    name = next(name for name, tensor in header.items() if tensor.get("shape") == [32])
    header[name] |= TENSOR_FAULTS[fault]
    with_header(path, json.dumps(header), data)
    expect_one_line_of(path, image)


FILE_FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:100],
    "cut in the tensors": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "a huge header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "a nested header": lambda content: struct.pack("<Q", 10**6) + DEEP.encode() + content,
    "a list of tensors": lambda content: struct.pack("<Q", 2) + b"[]" + content,
    "tensors of null": lambda content: struct.pack("<Q", 10) + b'{"a":null}' + content,
    "no text": lambda content: content[:20] + b"\xff\xfe" + content[22:],
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_damaged_model_file_is_one_line(changeable: Path, image: Path, fault: str) -> None:
    path = changeable / "small" / "model.safetensors"
    path.write_bytes(FILE_FAULTS[fault](path.read_bytes()))
    expect_one_line_of(path, image)


def expect_one_line_of(path: Path, image: Path) -> None:
    """Both commands refuse it, also where no hash file gives it away."""
    path.with_name("model.safetensors.sha256").unlink(missing_ok=True)
    for done in (score(path.parent, *NUMBERS), predict(path.parent, image)):
        expect_one_line(done, path.parent.name)


def expect_one_line(done: Result, message: str) -> None:
    expect_refusal(done, 3, message)
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 700


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(predict_command, [str(argument) for argument in arguments])


@pytest.fixture
def changeable(scored: Path, tmp_path: Path) -> Path:
    """A copy of the scored run that a test may change."""
    shutil.copytree(scored / "small", tmp_path / "changeable" / "small")
    return tmp_path / "changeable"


@pytest.fixture(scope="module")
def image(phantom_tree: Path) -> Path:
    return min(phantom_tree.rglob("*.png"))


DECISIONS_FAULTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda record: "",
    "a list": lambda record: "[]",
    "nested": lambda record: DEEP,
    "no text": lambda record: "\udcff",
    "no weights": lambda record: json.dumps({**record, "weights_sha256": None}),
    "fitted on test": lambda record: json.dumps({**record, "fitted_on": "test"}),
    "an unknown rule": lambda record: json.dumps({**record, "rule": "\x1b[2J"}),
    "mirror as text": lambda record: json.dumps({**record, "tta": "yes"}),
    "thresholds as a list": lambda record: json.dumps({**record, "thresholds": [0.5] * 14}),
    "a finding less": lambda record: json.dumps({**record, "thresholds": {"Mass": 0.5}}),
    "a threshold of 2": lambda record: json.dumps({**record, "thresholds": {**record["thresholds"], "Mass": 2}}),
    "NaN": lambda record: json.dumps({**record, "thresholds": {**record["thresholds"], "Mass": float("nan")}}),
    "another calibration": lambda record: json.dumps({**record, "calibration": {"method": "none"}}),
    "a calibration of one finding": lambda record: json.dumps(
        {**record, "calibration": {"method": "platt", "findings": {"Mass": {"identity": "x"}}}}
    ),
    "a curve of huge numbers": lambda record: json.dumps(
        {**record, "calibration": {"method": "platt", "findings": {"Mass": {"slope": 10**400, "intercept": 0}}}}
    ),
}


@pytest.mark.parametrize("fault", DECISIONS_FAULTS)
def test_damaged_decisions_are_one_line(changeable: Path, image: Path, fault: str) -> None:
    path = changeable / "small" / "decisions.json"
    text = DECISIONS_FAULTS[fault](json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    for done in (score(path.parent, *NUMBERS), predict(path.parent, image)):
        expect_one_line(done, "decisions.json")


def test_weights_that_give_no_numbers_predict_nothing(changeable: Path, image: Path) -> None:
    path = changeable / "small" / "model.safetensors"
    header, data = header_of(path)
    begin, end = header["network.head.output.weight"]["data_offsets"]
    with_header(path, json.dumps(header), data[:begin] + b"\xff" * (end - begin) + data[end:])
    path.with_name("model.safetensors.sha256").unlink()
    decisions = json.loads(path.with_name("decisions.json").read_text())
    weights = {**decisions, "weights_sha256": read_header(path).weights_sha256}
    path.with_name("decisions.json").write_text(json.dumps(weights))
    expect_one_line(predict(path.parent, image), "gives outputs that are not all numbers")


PREDICTIONS_FAULTS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    "text for a label": lambda table: as_csv(table.assign(label_Mass="x")),
    "a label of 300": lambda table: as_csv(table.assign(label_Mass=300)),
    "other labels": lambda table: as_csv(table.assign(label_Mass=1 - table["label_Mass"])),
    "a fraction for a label": lambda table: as_csv(table.assign(label_Mass=0.5)),
    "text for a probability": lambda table: as_csv(table.assign(prob_Mass="high")),
    "NaN": lambda table: as_csv(table.assign(prob_Mass=float("nan"))),
    "an infinite probability": lambda table: as_csv(table.assign(prob_Mass=float("inf"))),
    "a probability of 2": lambda table: as_csv(table.assign(prob_Mass=2.0)),
    "rows twice": lambda table: as_csv(pd.concat([table, table])),
    "rows left out": lambda table: as_csv(table.iloc[1:]),
    "rows in another order": lambda table: as_csv(table.iloc[::-1]),
    "rows that are not in the shards": lambda table: as_csv(table.assign(row=table["row"] + 10**6)),
    "rows as fractions": lambda table: as_csv(table.assign(row=table["row"] + 0.5)),
    "huge rows": lambda table: as_csv(table.assign(row=10**30)),
    "other patients": lambda table: as_csv(table.assign(patient=5)),
    "other images": lambda table: as_csv(table.assign(image="x")),
    "no images": lambda table: as_csv(table.drop(columns="image")),
    "no findings": lambda table: as_csv(table[["image", "patient", "row"]]),
    "no line": lambda table: as_csv(table.iloc[:0]),
    "empty": lambda table: b"",
    "no text": lambda table: b"\xff\xfe\x00" + as_csv(table),
    "an open quote": lambda table: as_csv(table).replace(b"\n0", b'\n"0', 1),
    "zeros": lambda table: b"\x00" * 1000,
}


def as_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


@pytest.mark.parametrize("fault", PREDICTIONS_FAULTS)
def test_stored_predictions_that_cannot_be_are_made_anew(changeable: Path, fault: str) -> None:
    """Their note says all the same that they are unchanged."""
    path = changeable / "small" / "eval" / "test" / "predictions.csv"
    before = path.read_bytes()
    path.write_bytes(PREDICTIONS_FAULTS[fault](pd.read_csv(path)))
    note = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**note, "csv_sha256": sha256_of(path)}))
    succeed("small", "--runs", changeable, *NUMBERS)
    assert path.read_bytes() == before


def test_stored_predictions_that_cannot_be_are_replaced_by_a_good_copy(changeable: Path) -> None:
    path = changeable / "small" / "eval" / "test" / "predictions.csv"
    before = path.read_bytes()
    other = path.parents[1] / "elsewhere" / path.name
    other.parent.mkdir()
    for each in (path, path.with_suffix(".json")):
        shutil.copy(each, other.parent)
    path.write_bytes(PREDICTIONS_FAULTS["rows left out"](pd.read_csv(path)))
    note = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**note, "csv_sha256": sha256_of(path)}))
    succeed("small", "--runs", changeable, *NUMBERS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", DEEP, '{"csv_sha256": []}', "\udcff"])
def test_a_damaged_note_of_predictions_has_them_made_anew(changeable: Path, text: str) -> None:
    path = changeable / "small" / "eval" / "test" / "predictions.json"
    before = path.read_bytes()
    path.write_bytes(text.encode(errors="surrogateescape"))
    succeed("small", "--runs", changeable, *NUMBERS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "maps", [5, [5], [{}], [{"file": ".."}], [{"file": 5, "sha256": None}], "nested", "a finding of 5"]
)
def test_a_damaged_gallery_is_drawn_again(changeable: Path, maps: Any) -> None:
    path = changeable / "small" / "eval" / "test" / "heatmaps" / "gallery.json"
    before = path.read_bytes()
    record = json.loads(before)
    if maps == "a finding of 5":
        maps = [{**each, "finding": 5} for each in record["maps"]]
    path.write_text(DEEP if maps == "nested" else json.dumps({**record, "maps": maps}))
    succeed("small", "--runs", changeable, "--heatmaps", 1, *NUMBERS[:3])
    assert path.read_bytes() == before


def test_a_gallery_of_an_older_version_which_nested_the_key_is_drawn_again(changeable: Path) -> None:
    path = changeable / "small" / "eval" / "test" / "heatmaps" / "gallery.json"
    before = path.read_bytes()
    key = json.loads(before)
    older = {"format": key.pop("format"), "maps": key.pop("maps"), "proof": key}
    path.write_text(json.dumps(older))
    succeed("small", "--runs", changeable, "--heatmaps", 1, *NUMBERS[:3])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe", b'finding,images\n"Mass', None])
def test_a_damaged_localization_is_measured_again(changeable: Path, content: bytes | None) -> None:
    path = changeable / "small" / "eval" / "test" / "heatmaps" / "localization.csv"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"micro", b"macro") if content is None else content)
    note = path.with_suffix(".json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "csv_sha256": sha256_of(path)}))
    succeed("small", "--runs", changeable, "--heatmaps", 1, *NUMBERS[:3])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", [DEEP, '{"macro": {"auroc": true}}', '{"macro": {"auroc": []}}', '{"macro": 5}', "\udcff"]
)
def test_damaged_scores_take_no_run_from_the_list(changeable: Path, text: str) -> None:
    path = changeable / "small" / "eval" / "test" / "metrics.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert "damaged; python -m eval small" in succeed("--runs", changeable).stdout


@pytest.mark.parametrize("shards", [None, 5, ["a"]])
def test_a_config_without_shards_is_one_line(changeable: Path, shards: Any) -> None:
    path = changeable / "small" / "config.json"
    record = json.loads(path.read_text())
    record["shards"]["value"] = shards
    path.write_text(json.dumps(record))
    expect_one_line(score("small", "--runs", changeable, *NUMBERS), "config.json, shards is damaged")
