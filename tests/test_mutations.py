"""Every kind of file from outside, changed at random and signed again, under the commands that read it.

None of them may end in a traceback, with an exit code that DESIGN does not list, with more than 1 GB, or
after more than 30 s of a processor. `pytest -m mutations` runs 300 of each kind.
"""

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shards.boxes import BOXES
from shards.files import sha256_of
from shards.folder import open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.phantoms import make_phantoms
from shards.pixels import PixelRecipe
from tests.mutating import (
    Ended,
    Server,
    mutate_bytes,
    mutate_csv,
    mutate_header,
    mutate_index,
    mutate_jpeg,
    mutate_json,
    mutate_png,
    mutate_state,
    to_json,
)
from tests.trainer.running import command, stop_at, train
from trainer.logging.checkpoints import load_checkpoint

FEW, MANY = 6, 300
MOST_SECONDS, MOST_KIBIBYTES = 30, 2**20
HANGS = 300
"""Seconds by the clock, even beside much other work."""
CODES = {0, 2, 3, 4, 5}
SIZE, SHARD_SIZE = 32, 16
OPTIONS = {"epochs": 2, "batch_size": 16, "loader": "resident", "ema": 0.5}
# The numbers alone, which is quick.
SCORES = ("--resamples", "0", "--no-report", "--heatmaps", "0")

Draw = random.Random
Command = tuple[str, list[str]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A tree, its shards, a run that is scored, and one that was stopped within its second epoch."""
    folder = tmp_path_factory.mktemp("template")
    make_phantoms(folder / "tree", images=64, size=64, seed=0)
    plan = make_plan(folder / "tree", SplitRecipe(val_fraction=0.25))
    pack(plan, folder / "shards", PixelRecipe(size=SIZE), shard_size=SHARD_SIZE)
    shards, runs = open_shards(folder / "shards"), folder / "runs"
    assert train(shards, runs, "done", **{**OPTIONS, "epochs": 1}).exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        assert train(shards, runs, "open", **OPTIONS).exit_code == 143
    ended, errors = server.run("eval", ["done", "--runs", str(runs), *SCORES], folder, 600)
    assert ended.code == 0, errors
    return folder


class Case:
    """A copy of the template to be changed; large files are links until they are written."""

    def __init__(self, template: Path, folder: Path) -> None:
        def copy(source: str, target: str) -> None:
            os.link(source, target) if os.path.getsize(source) > 2**16 else shutil.copy2(source, target)

        shutil.copytree(template, folder, copy_function=copy)
        self.folder, self.tree, self.shards, self.runs = (
            folder,
            *(folder / name for name in ("tree", "shards", "runs")),
        )
        self.done, self.open = self.runs / "done", self.runs / "open"

    def change(self, path: Path, mutate: Callable[[Draw, bytes], bytes], draw: Draw) -> None:
        data = mutate(draw, path.read_bytes())
        path.unlink()
        path.write_bytes(data)

    def sign(self, path: Path) -> None:
        """Make the hash beside a file fit it."""
        path.with_name(f"{path.name}.sha256").write_text(sha256_of(path) + "\n")

    def sign_shards(self) -> None:
        """Make every hash in the manifest fit, as far as it is one."""
        path = self.shards / "manifest.json"
        try:
            record = json.loads(path.read_bytes())
            del record["sha256"]
            for shard in record["shards"]:
                tar = self.shards / shard["name"]
                shard |= {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
                shard["idx_sha256"] = sha256_of(tar.with_suffix(".idx"))
            for name in ("entries", "rejects", "boxes"):
                record[f"{name}_sha256"] = sha256_of(self.shards / f"{name}.csv")
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            pass
        else:
            self._write_manifest(record)

    def resign_manifest(self) -> None:
        """Make only the manifest's own hash fit its text."""
        try:
            record = json.loads((self.shards / "manifest.json").read_bytes())
            del record["sha256"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        self._write_manifest(record)

    def _write_manifest(self, record: dict[str, Any]) -> None:
        sha256 = hashlib.sha256(to_json(record)[:-1]).hexdigest()
        (self.shards / "manifest.json").write_bytes(to_json({**record, "sha256": sha256}))

    # Commands.

    def verify(self) -> Command:
        return "verify_shards", [str(self.shards), "--jobs", "1"]

    def pack(self) -> Command:
        sizes = ["--size", str(SIZE), "--shard-size", str(SHARD_SIZE), "--val-fraction", "0.25"]
        return "make_shards", [str(self.tree), str(self.shards), *sizes, "--jobs", "1"]

    def pack_anew(self) -> Command:
        return "make_shards", [str(self.tree), str(self.folder / "new"), "--size", "32", "--jobs", "1"]

    def train(self, name: str = "new", **changes: Any) -> Command:
        shards = type("Folder", (), {"path": self.shards})
        options = {**OPTIONS, **changes}
        return "trainer", command(shards, self.runs, name, **options)[3:]  # type: ignore[arg-type]

    def go_on(self) -> Command:
        return self.train("open")

    def train_anew(self, draw: Draw) -> Command:
        # Those that start processes take seconds.
        loader = draw.choice([*7 * ["resident", "dali"], "dataloader", "webdataset"])
        return self.train(loader=loader, epochs=1)

    def eval(self, *options: str) -> Command:
        return "eval", ["done", "--runs", str(self.runs), "--shards", str(self.shards), *options]

    def predict(self, image: Path) -> Command:
        return "predict", ["done", str(image), "--runs", str(self.runs), "--device", "cpu"]

    def an_image(self, draw: Draw) -> Path:
        return draw.choice(sorted(self.tree.rglob("*.png")))

    def on_shards(self, draw: Draw) -> Command:
        others = ["--allow-other-shards", "--force", *SCORES]
        commands = [self.verify, self.pack, lambda: self.train_anew(draw), lambda: self.eval(*others)]
        return draw.choice(commands)()


def manifest(case: Case, draw: Draw) -> Command:
    case.change(case.shards / "manifest.json", mutate_json, draw)
    case.resign_manifest()
    return case.on_shards(draw)


def index(case: Case, draw: Draw) -> Command:
    case.change(draw.choice(sorted(case.shards.glob("*.idx"))), mutate_index, draw)
    case.sign_shards()
    return case.on_shards(draw)


def entries(case: Case, draw: Draw) -> Command:
    case.change(case.shards / "entries.csv", mutate_csv, draw)
    case.sign_shards()
    return case.on_shards(draw)


def boxes(case: Case, draw: Draw) -> Command:
    case.change(case.shards / BOXES, mutate_csv, draw)
    case.sign_shards()
    located = ["--allow-other-shards", "--resamples", "0", "--no-report", "--heatmaps", "1"]
    return draw.choice([case.verify, case.pack, lambda: case.eval(*located)])()


def config(case: Case, draw: Draw) -> Command:
    run = draw.choice([case.done, case.open])
    case.change(run / draw.choice(["config.json", "config.json", "environment.json"]), mutate_json, draw)
    if run == case.open:
        return case.train("open", **draw.choice([{}, {"loader": "auto"}]))
    listing = ("eval", ["--runs", str(case.runs)])
    report = ("--resamples", "0", "--heatmaps", "0")
    return draw.choice([case.eval(*SCORES), case.eval(*report), listing, case.predict(case.an_image(draw))])


def metrics(case: Case, draw: Draw) -> Command:
    def mutate(draw: Draw, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        number = draw.randrange(len(lines))
        lines[number] = b" ".join(mutate_json(draw, lines[number]).split()) + b"\n"
        return b"".join(lines)

    run = draw.choice([case.done, case.open])
    case.change(run / "metrics.jsonl", draw.choice([mutate, mutate, mutate_bytes]), draw)
    return case.go_on() if run == case.open else case.eval("--resamples", "0", "--heatmaps", "0")


def checkpoint(case: Case, draw: Draw) -> Command:
    path = case.open / "checkpoints" / draw.choice(["last.pt", "last.pt", "last.pt", "best.pt"])
    if draw.random() < 0.25:
        case.change(path, mutate_bytes, draw)
    else:
        buffer = io.BytesIO()
        torch.save(mutate_state(draw, load_checkpoint(path)), buffer)
        path.unlink()
        path.write_bytes(buffer.getvalue())
    case.sign(path)
    return case.go_on()


def model_header(case: Case, draw: Draw) -> Command:
    decisions = case.done / "decisions.json"
    if decisions.is_file() and draw.random() < 0.3:
        case.change(decisions, mutate_json, draw)
    else:
        case.change(case.done / "model.safetensors", mutate_header, draw)
        if (case.done / "model.safetensors.sha256").is_file():
            case.sign(case.done / "model.safetensors")
    anew = ("--force", *SCORES)
    return draw.choice([case.eval(*SCORES), case.eval(*anew), case.predict(case.an_image(draw))])


def predictions(case: Case, draw: Draw) -> Command:
    csv = draw.choice(sorted(case.done.glob("eval/*/*predictions.csv")))
    if draw.random() < 0.2:
        case.change(csv.with_suffix(".json"), mutate_json, draw)
    else:
        case.change(csv, mutate_csv, draw)
        note = json.loads(csv.with_suffix(".json").read_text())
        csv.with_suffix(".json").write_text(json.dumps({**note, "csv_sha256": sha256_of(csv)}, indent=1) + "\n")
    split = "val" if "val" in csv.name + csv.parent.name else "test"
    submitted = ["--entries", str(case.shards), "--split", split, "--resamples", "0"]
    return draw.choice([case.eval(*SCORES), case.eval(*SCORES), ("eval.score", [str(csv), *submitted])])


def nih_csv(case: Case, draw: Draw) -> Command:
    names = ("Data_Entry_2017*.csv", "Data_Entry_2017*.csv", "BBox_List_2017.csv", "test_list.txt")
    path = next(case.tree.glob(draw.choice(names)))
    case.change(path, mutate_csv, draw)
    return case.pack_anew()


def png(case: Case, draw: Draw) -> Command:
    path = case.an_image(draw)
    case.change(path, draw.choice([mutate_bytes, mutate_png]), draw)
    return draw.choice([case.pack_anew, lambda: case.predict(path)])()


def jpeg(case: Case, draw: Draw) -> Command:
    if draw.random() < 0.5:
        path = case.folder / "image.jpg"
        Image.open(case.an_image(draw)).convert("L").save(path, "JPEG")
        case.change(path, draw.choice([mutate_bytes, mutate_jpeg]), draw)
        return case.predict(path)
    tar = draw.choice(sorted(case.shards.glob("*.tar")))
    first = tar.read_bytes()

    def within(draw: Draw, data: bytes) -> bytes:
        # One image in the place of which as many bytes are put.
        offset, size = (int(word) for word in draw.choice(lines).split()[1:3])
        image = draw.choice([mutate_bytes, mutate_jpeg])(draw, data[offset : offset + size])
        return data[:offset] + image[:size].ljust(size, b"\0") + data[offset + size :]

    lines = tar.with_suffix(".idx").read_text().splitlines()[1:]
    case.change(tar, within, draw)
    assert tar.stat().st_size == len(first)
    case.sign_shards()
    return case.on_shards(draw)


def toml(case: Case, draw: Draw) -> Command:
    path = case.folder / "options.toml"
    lines = ["lr = 0.01", 'arch = "custom_cnn"', "batch-size = 16", 'log_to = ["none"]', "epochs = 1", "seed = 3"]
    for _ in range(draw.randint(1, 2)):
        values = (
            "1e999",
            "nan",
            "-1",
            "[]",
            "[[1]]",
            "{}",
            "{ value = [] }",
            "2020-01-01",
            '"x"',
            "true",
            "9" * 400,
            "[" * 2000,
            "[" * 100_000,
            '"' + "x" * 100_000 + '"',
            '"\\u001b[2J"',
            "",
            "'''\n'''",
        )
        line = draw.choice([*lines, "a" + ".a" * draw.choice([10, 7000, 50_000]) + " = 1", "[lr]", "[[lr]]"])
        lines.append(f"{line.split(' = ')[0]} = {draw.choice(values)}" if draw.random() < 0.8 else line)
        draw.shuffle(lines)
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    if draw.random() < 0.4:
        case.change(path, mutate_bytes, draw)
    if draw.random() < 0.2:
        path = case.done / "config.json"
        case.change(path, mutate_json, draw)
    where = ["--shards", str(case.shards), "--runs", str(case.runs), "--name", "new", "--device", "cpu"]
    ways: list[list[str]] = [["--dry-run"], ["--epochs", "1", "--arch", "custom_cnn", "--threads", "1"]]
    return "trainer", ["--config", str(path), *where, *draw.choice(ways)]


KINDS = {
    kind.__name__: kind
    for kind in (
        manifest,
        index,
        entries,
        boxes,
        config,
        metrics,
        checkpoint,
        model_header,
        predictions,
        nih_csv,
        png,
        jpeg,
        toml,
    )
}


def wrong_with(ended: Ended, errors: str) -> str | None:
    """Return what a command may not do and has done."""
    last = (errors.strip().splitlines() or [""])[-1]
    if ended.late:
        return f"not done after {HANGS} s"
    if ended.processor_seconds > MOST_SECONDS:
        return f"{ended.processor_seconds:.0f} s of a processor"
    if "Traceback" in errors:
        return f"a traceback that ends in {last[:300]}"
    if ended.code not in CODES and not (ended.code == 1 and "at step" in last):
        return f"exit code {ended.code}: {last[:300]}"
    if ended.code and not last.startswith("Error: "):
        return f"exit code {ended.code} without a word of why: {last[:300]}"
    if ended.kibibytes > MOST_KIBIBYTES:
        return f"{ended.kibibytes / 2**10:,.0f} MiB"
    return None


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.mutations)])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_file_holds_a_command_says_what_is_wrong_with_it_in_one_line(
    server: Server, template: Path, tmp_path: Path, kind: str, count: int
) -> None:
    found, codes, slowest, largest = [], {}, 0.0, 0
    for number in range(count):
        draw = Draw(f"{kind} {number}")
        folder = tmp_path / "case"
        program, arguments = KINDS[kind](Case(template, folder), draw)
        ended, errors = server.run(program, arguments, folder, HANGS)
        slowest, largest = max(slowest, ended.processor_seconds), max(largest, ended.kibibytes)
        codes[ended.code] = codes.get(ended.code, 0) + 1
        if wrong := wrong_with(ended, errors):
            found.append(f"{kind} {number}, {program}: {wrong}")
            print(found[-1], flush=True)  # seen at once with -s
            if kept := os.environ.get("CXRAPID_MUTATIONS"):
                shutil.copytree(folder, Path(kept) / f"{kind}-{number}", dirs_exist_ok=True)
        shutil.rmtree(folder)
    costs = f"{slowest:.1f} s of a processor, {largest / 2**10:,.0f} MiB"
    print(f"{kind}: exit codes {dict(sorted(codes.items()))}, at most {costs}", flush=True)
    assert not found, "\n".join([f"{len(found)} of {count}", *found])
