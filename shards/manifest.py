"""manifest.json: what a shard folder holds, how it was made, and the proof of its split."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.archives import NOT_READ
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.splits import SPLITS

FORMAT = 1
NAME = "manifest.json"
_TAR = re.compile(r"(train|val|test)-\d{5}\.tar")


@dataclass(frozen=True)
class ShardRecord:
    """One tar file."""

    name: str
    """`{split}-{number:05}.tar`"""
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """One split."""

    images: int
    patients: int
    positives: dict[str, int]
    """Images that show each finding, in FINDINGS order."""
    prevalence: dict[str, float | None]
    """Share of images that show each finding, to six digits; None in a split without images."""


@dataclass(frozen=True)
class Manifest:
    """The record of a shard folder. `digest` binds runs and resume states to it."""

    recipe: dict[str, Any]
    """Every option that decides the bytes: split rule and seed, size, encoding, quality, ..."""
    source_sha256: str
    """Of the metadata CSV as it was read."""
    entries_sha256: str
    """Of entries.csv."""
    rejects_sha256: str
    """Of rejects.csv."""
    mean: float
    """Of the train pixels before encoding, 0..255."""
    std: float
    psnr: float | None
    """Mean peak signal-to-noise ratio of the encoding in dB, over the rows that 16 divides; None
    for png, which is lossless, and where no such row was packed."""
    pillow: str
    """Version of Pillow, which decoded, resized and encoded."""
    splits: dict[str, SplitRecord]
    shards: tuple[ShardRecord, ...]
    rejects: int
    patients_in_two_splits: int
    """0: packing stops before it would be anything else."""
    boxes_sha256: str | None = None
    """Of boxes.csv; None where it was packed without a list of boxes."""
    warnings: dict[str, int] | None = None
    """Images that look wrong in a way that `shards.packing.oddities` names; None where there are none."""

    @property
    def size(self) -> int:
        """Height and width of every image in pixels."""
        return int(self.recipe["size"])

    @property
    def extension(self) -> str:
        """`jpg` or `png`, the name of the image member of a sample."""
        return {"jpeg": "jpg", "png": "png"}[self.recipe["encoding"]]

    def shards_of(self, split: str) -> tuple[ShardRecord, ...]:
        """Return the shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.name.startswith(f"{split}-"))

    def to_json(self) -> str:
        """Return the text of manifest.json; its last field is the SHA-256 of all that stands before it."""
        record = {"format": FORMAT, "findings": list(FINDINGS), **dataclasses.asdict(self)}
        if self.boxes_sha256 is None:  # as manifests were before there were boxes
            del record["boxes_sha256"]
        if self.warnings is None:
            del record["warnings"]
        sha256 = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
        return json.dumps({**record, "sha256": sha256}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`; raise BadData naming what is wrong with it."""
    path = folder / NAME
    if not path.is_file():
        raise BadData(_no_shards(folder))
    return parse_manifest(path.read_bytes(), path)


def _no_shards(folder: Path) -> str:
    tars = [tar.name for tar in folder.glob("*.tar")]
    if folder.is_file():
        return f"{folder} is a file; give the folder of shards, which holds {NAME}"
    if any(_TAR.fullmatch(tar) for tar in tars):
        return (
            f"no shards in {folder} yet: it holds tars but no {NAME}, which comes last; the command that "
            "packs or fetches them, run again, finishes it"
        )
    if tars:
        return (
            f"no shards in {folder}: it holds tars but no {NAME}, and {NOT_READ}: "
            "python scripts/make_shards.py SOURCE OUT"
        )
    absent = "" if folder.exists() else "; if they were moved, say where they are (--shards FOLDER)"
    return (
        f"no shards in {folder} ({f'no {NAME}' if folder.exists() else 'there is no such folder'}){absent}; "
        f"pack the NIH download with `python scripts/make_shards.py SOURCE {folder}`, or try without it: "
        "`python scripts/make_phantoms.py data/phantoms` and pack that folder"
    )


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """Check the bytes of the manifest.json at `path`; raise BadData naming what is wrong with it."""
    try:
        text = data.decode("utf-8")
        record = json.loads(text)
        if record.pop("format") != FORMAT:
            raise BadData(f"{path} has another format than {FORMAT}; pack again")
        findings = record.pop("findings")
        if findings != list(FINDINGS):
            raise BadData(f"{path} has other findings, or another order: {', '.join(map(str, findings))}")
        splits = {name: SplitRecord(**split) for name, split in record.pop("splits").items()}
        shards = tuple(ShardRecord(**shard) for shard in record.pop("shards"))
        del record["sha256"]  # made anew and compared below, with the rest of the text
        manifest = Manifest(splits=splits, shards=shards, **record)
        if tuple(splits) != SPLITS or manifest.size < 1 or not manifest.extension:
            raise ValueError(f"splits {', '.join(splits)}")
        if not all(isinstance(number, int) for shard in shards for number in (shard.samples, shard.bytes)):
            raise ValueError("a shard's samples or bytes are not a whole number")
        if not all(tuple(each.positives) == tuple(each.prevalence) == FINDINGS for each in splits.values()):
            raise ValueError("a split counts other findings")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadData(f"{path} is damaged: {error or type(error).__name__}") from error
    for shard in shards:
        if not isinstance(shard.name, str) or not _TAR.fullmatch(shard.name):
            raise BadData(f"{path} names {shard.name!r}, which is no shard")
    for split in SPLITS:
        counted = sum(shard.samples for shard in manifest.shards_of(split))
        if counted != splits[split].images:
            raise BadData(
                f"{path}: the shards of {split} hold {counted} samples, the split {splits[split].images}"
            )
    if manifest.to_json() != text:
        raise BadData(f"{path} is damaged: its text is not the one that its sha256 was made of")
    return manifest
