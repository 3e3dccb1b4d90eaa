"""Resume an interrupted pack: check the plan, keep intact shards."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import __version__ as pillow

from shards.console import echo
from shards.csv_tables import parse_rejects
from shards.documents import Value, read_json
from shards.errors import BadData, CannotResume
from shards.files import atomic_write_text, sha256_of
from shards.folder import REJECTS, ShardFolder, open_shards, read_packed, restore_index
from shards.manifest import NAME, Manifest
from shards.packing.planning import Plan
from shards.packing.shard import ShardReport, ShardTask, is_intact, read_receipt
from shards.packing.sources import Packed, verify_same_images, verify_unchanged

WORK = ".packing"
_LARGEST_PLAN = 2**20  # bytes; the names of NIH's folders and all options are 2 KB
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
    receipts = {task.tar: receipt for task in tasks if (receipt := read_receipt(task))}
    for task in tasks:
        if task.tar in receipts:
            packed = [image for image, _ in receipts[task.tar].sources]
            verify_same_images(task.tar, packed, [sample.image for sample in task.samples])
    verify_sources(receipts.values(), source, jobs)
    return receipts


def verify_sources(receipts: Iterable[ShardReport], source: Path, jobs: int) -> None:
    """Raise CannotResume naming an image that changed since the shard of its receipt was packed."""
    packed = (Packed(image, sha256, receipt.read_ns) for receipt in receipts for image, sha256 in receipt.sources)
    verify_unchanged(source, packed, jobs)


def verify_finished(out: Path, manifest: Manifest, plan: Plan, tasks: list[ShardTask], write: Write, jobs: int) -> None:
    """Verify that a finished folder is whole and made of the plan's images; mend what is damaged.

    Writes nothing where all is well. A missing or damaged index is built again, a missing or
    damaged tar is packed again by `write`, both said on stderr. Raises CannotResume naming an
    image that is not what was packed, BadData where the damage cannot be mended.
    """
    _verify_same_sources(out, manifest, plan, jobs)
    records = {out / shard.name: shard for shard in manifest.shards}
    with ThreadPoolExecutor(jobs) as pool:
        whole = pool.map(lambda tar: is_intact(tar, records[tar]), records)
        damaged = [tar for tar, good in zip(records, whole, strict=True) if not good]
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
    verify_same_images(out, sorted(images), sorted(plan.images))
    published_ns = (out / NAME).stat().st_mtime_ns
    verify_unchanged(
        plan.source,
        (Packed(image, sha256, published_ns) for image, sha256 in zip(images, known["source_sha256"], strict=True)),
        jobs,
    )
