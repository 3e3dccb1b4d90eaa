"""Turn a table of entries and their splits into a shard folder.

The bytes depend on the plan and the recipe alone, not on the number of processes. Each shard is published under its
final name and leaves a receipt; the manifest comes last. The same command again after a kill keeps the shards whose
receipt and hashes agree and packs the rest.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow

from shards import boxes
from shards.csv_tables import PACKED_CRC32, entry_columns, escape_formulas
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text, exclusive_lock, remove_partials, sha256_of
from shards.folder import ENTRIES, REJECTS
from shards.manifest import NAME, Manifest, describe_split, read_manifest
from shards.packing.planning import Oddity, Plan, warn_of_oddities
from shards.packing.resume import (
    WORK,
    finished_shards,
    start_or_resume,
    verify_finished,
    verify_same_plan,
    verify_sources,
)
from shards.packing.shard import Sample, SampleReport, ShardReport, ShardTask, write_shards
from shards.pixels import REDUCING_GAP, PixelRecipe
from shards.splits import SPLITS


def pack(
    plan: Plan,
    out: Path,
    pixels: PixelRecipe,
    *,
    shard_size: int = 1024,
    jobs: int = 1,
    max_rejects: int = 0,
    strict: bool = False,
) -> Manifest:
    """Write the shard folder `out` with `jobs` processes and return its manifest.

    The manifest's recipe names everything that decides the bytes; packing into a folder made with another recipe,
    or of an image that is no longer the same, raises CannotResume naming what differs. Finding `out` finished and
    whole, it writes nothing; a shard that was damaged since is packed again. More than `max_rejects` images that do
    not decode, or none of train that does, raise BadData; all of them are listed in rejects.csv. What looks wrong
    though it can be packed (`planning.ODDITIES`) is printed on stderr and counted in the manifest, or, if `strict`,
    raises BadData. A full disk, too little memory, or another command at work in `out` raise ResourceMissing.
    """
    recipe = {
        **plan.split_recipe,
        **dataclasses.asdict(pixels),
        "reducing_gap": REDUCING_GAP,
        "aspect": "padded to a square",
        "shard_size": shard_size,
    }
    identity = {"recipe": recipe, "source_sha256": plan.source_sha256}
    tasks = _tasks(plan, out, shard_size)
    write = functools.partial(write_shards, source=plan.source, pixels=pixels, jobs=jobs)
    warn_of_oddities(plan.oddities, strict=strict)
    try:
        with exclusive_lock(out):
            if (out / NAME).is_file():
                manifest = read_manifest(out)
                verify_same_plan(out, identity, {"recipe": manifest.recipe, "source_sha256": manifest.source_sha256})
                verify_finished(out, manifest, plan, tasks, write, jobs)
                found = {kind: Oddity(count) for kind, count in (manifest.warnings or {}).items()}
                warn_of_oddities({kind: odd for kind, odd in found.items() if kind not in plan.oddities}, strict=strict)
            else:
                start_or_resume(out, identity)
                receipts = finished_shards(tasks, plan.source, jobs)
                todo = [task for task in tasks if task.tar not in receipts]
                done = len(plan.images) - sum(len(task.samples) for task in todo)
                receipts |= {task.tar: receipt for task, receipt in write(todo, done=done)}
                verify_sources(receipts.values(), plan.source, jobs)  # some may have changed meanwhile
                ordered = [receipts[task.tar] for task in tasks]
                found = _oddities(ordered)
                warn_of_oddities(found, strict=strict)
                warnings = {kind: odd.images for kind, odd in [*plan.oddities.items(), *found.items()]}
                manifest = _publish(plan, out, identity, ordered, max_rejects, warnings)
            # What a kill left behind goes, too.
            remove_partials(out)
            if (out / WORK).exists():
                shutil.rmtree(out / WORK)
    except MemoryError as error:
        raise ResourceMissing(
            "out of memory; run the same command to continue, with --jobs 1 to need the least memory"
        ) from error
    if manifest.rejects > max_rejects:
        raise BadData(
            f"{out} is finished, but {manifest.rejects} images were left out, more than --max-rejects "
            f"{max_rejects} (all in {out / REJECTS}); allow them, or mend them and give another folder"
        )
    return manifest


def _tasks(plan: Plan, out: Path, shard_size: int) -> list[ShardTask]:
    labels = plan.table[list(plan.findings)].to_numpy(dtype=np.uint8)
    samples = [Sample(row, image, labels[row].tobytes()) for row, image in enumerate(plan.images)]
    tasks = []
    for split in SPLITS:
        mine = [samples[row] for row in np.flatnonzero(plan.table["split"] == split)]
        for number, start in enumerate(range(0, len(mine), shard_size)):
            name = f"{split}-{number:05d}"
            tasks.append(ShardTask(out / f"{name}.tar", out / WORK / f"{name}.json", mine[start : start + shard_size]))
    return tasks


def _publish(
    plan: Plan,
    out: Path,
    identity: dict[str, Any],
    receipts: list[ShardReport],
    max_rejects: int,
    warnings: dict[str, int],
) -> Manifest:
    samples = [sample for receipt in receipts for sample in receipt.samples]
    planned = plan.table.assign(
        source_sha256=[sample.sha256 for sample in samples], packed_crc32=[sample.crc32 for sample in samples]
    )
    rejects = {sample.row: sample.reject for sample in samples if sample.reject is not None}
    left_out = planned.loc[list(rejects), ["image", "folder", "source_sha256"]]
    left_out.insert(1, "reason", list(rejects.values()))
    atomic_write_text(out / REJECTS, escape_formulas(left_out).to_csv(index=False, lineterminator="\n"))
    entries = planned.drop(index=left_out.index)
    too_many = len(rejects) > max_rejects
    if too_many or not (entries["split"] == "train").any():
        bound = f"more than --max-rejects {max_rejects}" if too_many else "which leaves none of train"
        first = left_out.iloc[0]
        raise BadData(
            f"{len(rejects)} images do not decode, {bound}; the first is {first['folder']}/{first['image']}: "
            f"{first['reason']} (all in {out / REJECTS})"
        )
    _, *columns = [*entry_columns(plan.findings), PACKED_CRC32]  # the first, row, is the index
    atomic_write_text(out / ENTRIES, escape_formulas(entries[columns]).to_csv(lineterminator="\n"))
    if plan.boxes is not None:
        atomic_write_text(out / boxes.BOXES, boxes.to_csv(boxes.by_row(plan.boxes, entries["image"], plan.findings)))
    manifest = Manifest(
        findings=plan.findings,
        **identity,
        pillow=pillow,
        entries_sha256=sha256_of(out / ENTRIES),
        rejects_sha256=sha256_of(out / REJECTS),
        **_pixel_statistics(samples, set(entries.index[entries["split"] == "train"]), identity["recipe"]["size"]),
        splits={split: describe_split(entries[entries["split"] == split], plan.findings) for split in SPLITS},
        shards=tuple(receipt.shard for receipt in receipts if receipt.shard.samples),
        rejects=len(rejects),
        patients_in_two_splits=int((entries.groupby("patient")["split"].nunique() > 1).sum()),
        boxes_sha256=None if plan.boxes is None else sha256_of(out / boxes.BOXES),
        warnings=warnings or None,
    )
    atomic_write_text(out / NAME, manifest.to_json())
    return manifest


def _oddities(receipts: Iterable[ShardReport]) -> dict[str, Oddity]:
    images: dict[str, list[str]] = {}
    for receipt in receipts:
        for sample in receipt.samples:
            for kind in sample.oddities:
                images.setdefault(kind, []).append(sample.image)
    return {kind: Oddity(len(found), found[0]) for kind, found in sorted(images.items())}


def _pixel_statistics(samples: list[SampleReport], train: set[int], size: int) -> dict[str, Any]:
    mine = [sample for sample in samples if sample.row in train]
    pixels = len(mine) * size * size
    mean = sum(sample.pixel_sum for sample in mine) / pixels
    square_mean = sum(sample.pixel_square_sum for sample in mine) / pixels
    psnrs = [sample.psnr for sample in samples if sample.psnr is not None]
    return {
        "mean": mean,
        "std": float(np.sqrt(max(square_mean - mean * mean, 0.0))),
        # Two digits: a logarithm's last ones differ between machines.
        "psnr": round(sum(psnrs) / len(psnrs), 2) if psnrs else None,
    }
