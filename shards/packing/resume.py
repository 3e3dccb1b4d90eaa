"""Resume an interrupted pack: verify that plan and source images are the same, keep intact shards.

As `make` does, this trusts times: a file whose status last changed before it was read is not read again. The status
time, unlike the modification time, cannot be set back by copying or unpacking an older file over a newer one. Files
that changed later are compared by SHA-256.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import __version__ as pillow

from shards.console import echo, progress_bar
from shards.csv_tables import parse_rejects
from shards.documents import Value, read_json
from shards.errors import BadData, CannotResume
from shards.files import atomic_write_text, sha256_of
from shards.folder import REJECTS, ShardFolder, open_shards, read_packed, restore_index
from shards.manifest import NAME, Manifest
from shards.packing.planning import Plan
from shards.packing.shard import ShardReport, ShardTask, is_intact, read_receipt

WORK = ".packing"
_LARGEST_PLAN = 2**20  # bytes; the names of NIH's folders and all options are 2 KB
# Clocks of file systems are coarse (2 s on FAT), and a server's may differ from this machine's.
_SLACK_NS = 2_000_000_000
# Images that are read again without a progress bar: a second's worth.
_SILENT = 1000
Write = Callable[[list[ShardTask]], Iterator[tuple[ShardTask, ShardReport]]]


@dataclass(frozen=True)
class _Identity:
    """What plan.json holds."""

    recipe: dict[str, Value]
    source_sha256: str
    pillow: str


def start_or_resume(out: Path, identity: dict[str, Any]) -> None:
    """Note in a new folder what is packed into it; in one that was begun, verify it is the same.

    Raises CannotResume naming what differs, and BadData where `out` holds something else.
    """
    plan_file = out / WORK / "plan.json"
    now = {**identity, "pillow": pillow}  # another version may encode to other bytes
    if plan_file.is_file():
        try:
            then = read_json(plan_file, _Identity, largest=_LARGEST_PLAN)
        except BadData as error:
            raise BadData(f"{error.message}; delete {out} and pack again") from error
        verify_same_plan(out, now, dataclasses.asdict(then))
    elif any(path.name != WORK for path in out.iterdir()):
        raise BadData(f"{out} holds other files and no shards; give an empty or new folder")
    else:
        atomic_write_text(plan_file, json.dumps(now))


def verify_same_plan(out: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raise CannotResume with every field by which two identities differ."""
    new, old = ({**side, **side["recipe"], "recipe": None} for side in (now, then))
    names = {"source_sha256": "metadata CSV"}
    differing = [
        f"{names.get(key, key)} was {old.get(key)}, is now {new.get(key)}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise CannotResume(f"{out} was packed otherwise: {'; '.join(differing)}. Give another folder for this one")


def finished_shards(tasks: list[ShardTask], source: Path, jobs: int) -> dict[Path, ShardReport]:
    """Return the receipts of the shards that an interrupted pack left whole, by tar.

    Raises CannotResume where they were made of other images than these.
    """
    receipts = {}
    for task in tasks:
        if receipt := read_receipt(task):
            packed = [sample.image for sample in receipt.samples]
            _verify_same_images(task.tar, packed, [sample.image for sample in task.samples])
            receipts[task.tar] = receipt
    verify_sources(receipts.values(), source, jobs)
    return receipts


def verify_sources(receipts: Iterable[ShardReport], source: Path, jobs: int) -> None:
    """Raise CannotResume naming an image that changed since the shard of its receipt was packed."""
    packed = ((sample.image, sample.sha256, receipt.read_ns) for receipt in receipts for sample in receipt.samples)
    _verify_unchanged(source, packed, jobs)


def verify_finished(out: Path, manifest: Manifest, plan: Plan, tasks: list[ShardTask], write: Write, jobs: int) -> None:
    """Verify that a finished folder is whole and made of the plan's images; mend what is damaged.

    Writes nothing where all is well. A missing or damaged index is built again, a missing or damaged tar is packed
    again by `write`, both said on stderr. Raises CannotResume naming an image that is not what was packed, BadData
    where the damage cannot be mended.
    """
    _verify_same_sources(out, manifest, plan, jobs)
    records = {out / shard.name: shard for shard in manifest.shards}
    with ThreadPoolExecutor(jobs) as pool:
        intact = pool.map(is_intact, records, records.values())
        damaged = [tar for tar, good in zip(records, intact, strict=True) if not good]
    lost = [tar for tar in damaged if not tar.is_file() or sha256_of(tar) != records[tar].sha256]
    for tar in damaged:
        if tar not in lost:
            tar.with_suffix(".idx").unlink(missing_ok=True)
            restore_index(tar, records[tar])
            echo(f"note: the index of {tar} was damaged or missing and is built again", err=True)
    for tar in lost:
        echo(f"note: {tar} is damaged or missing and is packed again", err=True)
    for task, receipt in write([task for task in tasks if task.tar in lost]):
        if receipt.shard != records[task.tar]:
            raise BadData(
                f"{task.tar} was damaged and does not come out as before (Pillow was {manifest.pillow}, is "
                f"now {pillow}); delete {out} and pack again"
            )
    open_shards(out)


def _verify_same_sources(out: Path, manifest: Manifest, plan: Plan, jobs: int) -> None:
    folder = ShardFolder(out, manifest, "")
    entries, _ = folder.entries, folder.boxes  # both verified
    csv = out / REJECTS
    rejects = parse_rejects(read_packed(csv, manifest.rejects_sha256, manifest.rejects), csv)
    columns = ["folder", "image", "source_sha256"]
    known = pd.concat([entries[columns], rejects[columns]])
    images = (known["folder"] + "/" + known["image"]).tolist()
    _verify_same_images(out, sorted(images), sorted(plan.images))
    published_ns = (out / NAME).stat().st_mtime_ns
    packed = ((image, sha256, published_ns) for image, sha256 in zip(images, known["source_sha256"], strict=True))
    _verify_unchanged(plan.source, packed, jobs)


def _verify_same_images(out: Path, packed: Sequence[str], planned: Sequence[str]) -> None:
    if packed == planned:
        return
    gone, new = sorted({*packed} - {*planned}), sorted({*planned} - {*packed})
    named = [f"{images[0]} {what}" for images, what in ((gone, "is gone"), (new, "is new")) if images]
    raise CannotResume(
        f"{out} was packed from other images: {' and '.join(named) or 'their order differs'}; "
        "give another folder for these"
    )


def _verify_unchanged(source: Path, packed: Iterable[tuple[str, str, int]], jobs: int) -> None:
    # Each image with the SHA-256 of its file, empty where it could not be read, and a time in ns before that.
    suspects = {source / image: sha256 for image, sha256, read_ns in packed if _changed_after(source / image, read_ns)}
    with (
        ThreadPoolExecutor(jobs) as pool,
        progress_bar(len(suspects), "reading images again", "img", disable=len(suspects) < _SILENT) as bar,
    ):
        changed = []
        for (path, sha256), found in zip(suspects.items(), pool.map(_sha256_or_empty, suspects), strict=True):
            bar.update()
            if found != sha256:
                changed.append(path)
    if changed:
        others = f", nor are {len(changed) - 1} others what they were" if len(changed) > 1 else ""
        raise CannotResume(
            f"{changed[0]} is not the file that was packed{others}; put back what was there, "
            "or give another folder for the shards"
        )


def _changed_after(path: Path, time_ns: int) -> bool:
    try:
        return path.stat().st_ctime_ns > time_ns - _SLACK_NS
    except OSError:
        return True


def _sha256_or_empty(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return ""
