"""manifest.json: what a shard folder holds, how it was made, and the counts that verify its split."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from msgspec import Meta

from shards.csv_tables import entry_columns
from shards.documents import Value, convert, parse_json, read_bytes
from shards.errors import BadData
from shards.findings import MOST_FINDINGS, check_findings
from shards.splits import SPLITS

FORMAT = 1
NAME = "manifest.json"
NOT_READ = "shards of another maker are not read (their labels may be pickles); start from the images"
LARGEST = 8 * 2**20
"""Bytes of a manifest. All of NIH's has 32 KB, and a shard adds 250 bytes."""
SUFFIX = {"jpeg": "jpg", "png": "png"}
_TAR = re.compile(r"(train|val|test)-\d{5}\.tar")
_Count = Annotated[int, Meta(ge=0, lt=2**31)]
_Positive = Annotated[int, Meta(ge=1, lt=2**53)]
_Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Gray = Annotated[float, Meta(ge=0, le=255)]
_Name = Annotated[str, Meta(max_length=64)]


@dataclass(frozen=True)
class ShardRecord:
    """One tar file."""

    name: str
    """`{split}-{number:05}.tar`"""
    samples: _Positive
    bytes: _Positive
    sha256: _Sha256
    idx_sha256: _Sha256


@dataclass(frozen=True)
class SplitRecord:
    """One split."""

    images: _Count
    patients: _Count
    positives: dict[str, _Count]
    """Images that show each finding, in the manifest's order."""
    prevalence: dict[str, float | None]
    """Share of images that show each finding, to six digits; None in a split without images."""


def describe_split(entries: pd.DataFrame, findings: Sequence[str]) -> SplitRecord:
    """Return the record of a split from its rows of entries.csv, which has these findings."""
    positives = {finding: int(entries[finding].sum()) for finding in findings}
    images = len(entries)
    return SplitRecord(
        images=images,
        patients=entries["patient"].nunique(),
        positives=positives,
        prevalence={finding: round(count / images, 6) if images else None for finding, count in positives.items()},
    )


@dataclass(frozen=True)
class Manifest:
    """The record of a shard folder. `digest` binds runs and resume states to it."""

    findings: tuple[str, ...]
    """What is labelled, in the order of every label vector: see `findings.check_findings`."""
    recipe: dict[str, Any]
    """Every option that decides the bytes: split rule and seed, size, encoding, quality, ..."""
    source_sha256: _Sha256
    """Of the metadata CSV as it was read."""
    entries_sha256: _Sha256
    """Of entries.csv."""
    rejects_sha256: _Sha256
    """Of rejects.csv."""
    mean: _Gray
    """Of the train pixels before encoding, 0..255."""
    std: _Gray
    psnr: float | None
    """Mean PSNR of the encoding in dB, over the rows that 16 divides; None for png and where no such row was packed."""
    pillow: _Name
    """Version of Pillow, which decoded, resized and encoded."""
    splits: dict[str, SplitRecord]
    shards: tuple[ShardRecord, ...]
    rejects: _Count
    patients_in_two_splits: _Count
    """0: packing stops before it would be anything else."""
    boxes_sha256: _Sha256 | None = None
    """Of boxes.csv; None where it was packed without a list of boxes."""
    warnings: dict[str, _Count] | None = None
    """Images that look wrong in a way that `shards.packing.planning.ODDITIES` names; None where there are none."""

    @property
    def size(self) -> int:
        """Height and width of every image in pixels."""
        return int(self.recipe["size"])

    @property
    def extension(self) -> str:
        """`jpg` or `png`, the name of the image member of a sample."""
        return SUFFIX[self.recipe["encoding"]]

    def shards_of(self, split: str) -> tuple[ShardRecord, ...]:
        """Return the shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.name.startswith(f"{split}-"))

    def to_json(self) -> str:
        """Return the text of manifest.json; its last field is the SHA-256 of all that stands before it."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        if self.boxes_sha256 is None:  # as manifests were before there were boxes
            del record["boxes_sha256"]
        if self.warnings is None:
            del record["warnings"]
        sha256 = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
        return json.dumps({**record, "sha256": sha256}, indent=1) + "\n"


@dataclass(frozen=True)
class _Head:
    """What tells whether a file is a manifest that this version reads."""

    format: int
    findings: Annotated[list[str], Meta(max_length=MOST_FINDINGS)]
    recipe: dict[str, Value]


@dataclass(frozen=True)
class _Recipe:
    """What is read of a recipe, which may have more."""

    split: Literal["official", "random", "file"]
    size: Annotated[int, Meta(ge=16, le=1024)]
    encoding: Literal["jpeg", "png"]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`; raise BadData naming what is wrong, ResourceMissing if unreadable."""
    path = folder / NAME
    if not path.is_file():
        raise BadData(_no_shards(folder))
    return parse_manifest(read_bytes(path, LARGEST), path)


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
    """Check the bytes of the manifest.json at `path`; raise BadData naming the field that is wrong."""
    head = parse_json(data, _Head, path)
    if head.format != FORMAT:
        raise BadData(f"{path} has another format than {FORMAT}; pack again")
    try:
        check_findings(head.findings)
        entry_columns(head.findings)
    except ValueError as error:
        raise BadData(f"{path}: {error}") from error
    convert(head.recipe, _Recipe, f"{path}, recipe")
    manifest = parse_json(data, Manifest, path)
    for shard in manifest.shards:
        if not _TAR.fullmatch(shard.name):
            raise BadData(f"{path} names {shard.name[:64]!r}, which is no shard")
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise BadData(f"{path} is damaged: it names a shard twice")
    if tuple(manifest.splits) != SPLITS:
        raise BadData(f"{path} is damaged: its splits are not {', '.join(SPLITS)}")
    for split, record in manifest.splits.items():
        if not tuple(record.positives) == tuple(record.prevalence) == manifest.findings:
            raise BadData(f"{path} is damaged: the split {split} counts other findings")
        counted = sum(shard.samples for shard in manifest.shards_of(split))
        if counted != record.images:
            raise BadData(f"{path}: the shards of {split} hold {counted} samples, the split {record.images}")
    if manifest.to_json().encode() != data:
        raise BadData(f"{path} is damaged: its text is not the one that its sha256 was made of")
    return manifest
