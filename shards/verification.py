"""Verify a shard folder: every byte against its manifest, every label against entries.csv."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from shards.boxes import BOXES, read_boxes
from shards.console import progress_bar
from shards.csv_tables import PACKED_CRC32, largest_table, parse_entries
from shards.documents import read_bytes
from shards.errors import BadData
from shards.files import sha256_of
from shards.findings import FINDINGS
from shards.folder import ENTRIES, REJECTS
from shards.inspection import ShardInspection, inspect_shard
from shards.manifest import NAME, Manifest, read_manifest
from shards.packing.resume import WORK
from shards.processes import map_in_processes
from shards.splits import SPLITS, verify_disjoint


@dataclass(frozen=True)
class Verification:
    """What was verified of a shard folder, or why it cannot be."""

    shards: int
    samples: int
    bytes: int
    """Of the tars."""
    patients: dict[str, int]
    """Per split, counted in entries.csv; of none is one in two splits, or it is a fault."""
    faults: tuple[str, ...]
    """Each names a file, the sample where it is one's, and the cause; none if all is verified."""
    warnings: tuple[str, ...]
    """What is odd but no fault: an index that was built again, a rest of packing."""


def verify_shards(path: Path, *, jobs: int = 1) -> Verification:
    """Verify a shard folder in `jobs` processes, or name what is wrong with it.

    Nothing in the manifest is believed: sizes and hashes are those of the files, counts and
    the disjointness of the splits those of entries.csv, members, labels, rows and pixels
    those of the tars; no file may be missing, nor be there without being named. The only file
    ever written is an index that was missing. Raises BadData where the manifest itself cannot
    be read or names what is no shard; everything else is collected in `faults`.
    """
    manifest = read_manifest(path)
    faults, warnings = _file_faults(path, manifest)
    patients = dict.fromkeys(SPLITS, 0)
    tasks: list[ShardInspection] = []
    try:
        csv, rows = path / ENTRIES, sum(split.images for split in manifest.splits.values())
        entries = parse_entries(read_bytes(csv, largest_table(rows)), csv)
        patients = {split: entries["patient"][entries["split"] == split].nunique() for split in SPLITS}
        faults += _count_faults(path, manifest, entries)
        faults += _box_faults(path, manifest, entries)
        tasks = _tasks(path, manifest, entries)
    except BadData as error:
        faults.append(f"{error.message}; so no shard can be compared with it")
    samples = sum(shard.samples for shard in manifest.shards)
    with progress_bar(samples, "verifying", "img") as bar:
        inspected = {}
        for task, result in map_in_processes(inspect_shard, tasks, jobs):
            inspected[task.tar] = result
            bar.update(task.record.samples)
    for task in tasks:
        faults += inspected[task.tar].faults
        warnings += inspected[task.tar].warnings
    return Verification(
        shards=len(manifest.shards),
        samples=samples,
        bytes=sum(shard.bytes for shard in manifest.shards),
        patients=patients,
        faults=tuple(faults),
        warnings=tuple(warnings),
    )


def _file_faults(path: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    faults, warnings = [], []
    tables = {ENTRIES: manifest.entries_sha256, REJECTS: manifest.rejects_sha256}
    if manifest.boxes_sha256 is not None:
        tables[BOXES] = manifest.boxes_sha256
    for name, sha256 in tables.items():
        if not (path / name).is_file():
            faults.append(f"{path / name} is missing")
        elif sha256_of(path / name) != sha256:
            faults.append(f"{path / name} is not the file that was packed (SHA-256 differs); pack or fetch it again")
    tars = [shard.name for shard in manifest.shards]
    named = {NAME, *tables, *tars, *(Path(tar).with_suffix(".idx").name for tar in tars)}
    for found in sorted(path.iterdir()):
        if found.name == WORK:  # of a pack that was killed after its last step
            warnings.append(f"{found} is a rest of packing; packing again removes it, and nothing reads it")
        elif found.name not in named:
            faults.append(f"{found} is in the folder, but the manifest does not name it; remove it")
    return faults, warnings


def _count_faults(path: Path, manifest: Manifest, entries: pd.DataFrame) -> list[str]:
    faults = []
    try:
        verify_disjoint(entries, entries["split"].to_numpy(dtype="<U5"))
    except BadData as error:
        faults.append(f"{path / ENTRIES}: {error.message}")
    if manifest.patients_in_two_splits:
        faults.append(f"{path / NAME} itself says that {manifest.patients_in_two_splits} patients are in two splits")
    for split in SPLITS:
        record, rows = manifest.splits[split], entries[entries["split"] == split]
        counts: list[tuple[str, object, object]] = [
            ("images", record.images, len(rows)),
            ("patients", record.patients, rows["patient"].nunique()),
        ]
        for finding in FINDINGS:
            positives = int(rows[finding].sum())
            share = round(positives / len(rows), 6) if len(rows) else None
            counts.append((finding, record.positives.get(finding), positives))
            counts.append((f"the prevalence of {finding}", record.prevalence.get(finding), share))
        faults += [
            f"{path / NAME} says {said} for {what} of {split}, {ENTRIES} has {found}"
            for what, said, found in counts
            if said != found
        ]
    return faults


def _box_faults(path: Path, manifest: Manifest, entries: pd.DataFrame) -> list[str]:
    # A file that is missing is named with the others.
    if manifest.boxes_sha256 is None or not (path / BOXES).is_file():
        return []
    try:
        rows = read_boxes(path / BOXES)["row"]
    except BadData as error:
        return [error.message]
    stray = rows[~rows.isin(entries.index)]
    return [f"{path / BOXES} has a box of row {row}, which {ENTRIES} has not" for row in stray.unique()]


def _tasks(path: Path, manifest: Manifest, entries: pd.DataFrame) -> list[ShardInspection]:
    labels = entries[list(FINDINGS)].to_numpy(dtype=np.uint8)
    crc32s = entries[PACKED_CRC32].to_numpy(dtype=np.int64) if PACKED_CRC32 in entries else None
    tasks = []
    for split in SPLITS:
        places = np.flatnonzero(entries["split"] == split)
        shards = manifest.shards_of(split)
        ends = np.cumsum([shard.samples for shard in shards], dtype=np.int64)
        for shard, mine in zip(shards, np.split(places, ends[:-1]), strict=True) if shards else ():
            rows = entries.index.to_numpy(dtype=np.int32)[mine]
            tasks.append(
                ShardInspection(
                    path / shard.name,
                    shard,
                    manifest.extension,
                    manifest.size,
                    rows,
                    labels[mine],
                    None if crc32s is None else crc32s[mine],
                )
            )
    return tasks
