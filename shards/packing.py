"""Packing: a table of entries with their split becomes a shard folder.

Work is divided by shard: each worker writes whole shards, publishes each under its final
name and leaves a receipt. The bytes depend on the plan alone, not on the number of jobs. The
same command again after a kill keeps the shards whose receipt and hashes agree and packs
the rest; the manifest is published last.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shards.errors import BadData, CannotResume, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ENTRIES, open_shards
from shards.manifest import NAME, Manifest, SplitRecord, read_manifest
from shards.planning import Plan
from shards.progress import progress_bar
from shards.publishing import publish_text, sha256_of
from shards.shard import PixelRecipe, Receipt, ShardTask, pack_shard, read_receipt
from shards.splits import SPLITS

REJECTS = "rejects.csv"
_WORK = ".packing"


def pack(
    plan: Plan, out: Path, pixels: PixelRecipe, *, shard_size: int = 1024, jobs: int = 1, max_rejects: int = 0
) -> Manifest:
    """Write the shard folder `out` and return its manifest.

    The manifest's recipe names everything that decides the bytes; packing into a folder made
    with another recipe raises CannotResume naming the fields. Finding `out` finished with the
    same recipe, it writes nothing. More than `max_rejects` images that do not decode raise
    BadData; all of them are listed in rejects.csv.
    """
    recipe = {
        **plan.split_recipe,
        **dataclasses.asdict(pixels),
        "filter": "lanczos",
        "aspect": "padded to a square",
        "shard_size": shard_size,
    }
    identity = {"recipe": recipe, "source_sha256": plan.source_sha256}
    planned = plan.table
    if (out / NAME).is_file():
        manifest = read_manifest(out)
        _same_plan(out, identity, {"recipe": manifest.recipe, "source_sha256": manifest.source_sha256})
        open_shards(out)
        shutil.rmtree(out / _WORK, ignore_errors=True)
        return manifest
    _start_or_resume(out, identity)
    tasks = _tasks(plan, out, pixels, shard_size)
    receipts = _run(tasks, jobs)
    rejects = {row: reason for receipt in receipts for row, reason in receipt.rejects}
    _write_rejects(out, planned, rejects)
    if len(rejects) > max_rejects:
        first = min(rejects)
        raise BadData(
            f"{len(rejects)} images do not decode, more than --max-rejects {max_rejects}; the first is "
            f"{planned['folder'][first]}/{planned['image'][first]}: {rejects[first]} (all in {out / REJECTS})"
        )
    entries = planned.drop(index=list(rejects))
    publish_text(out / ENTRIES, entries[_entry_columns()].to_csv(lineterminator="\n"))
    manifest = Manifest(
        recipe=recipe,
        source_sha256=plan.source_sha256,
        entries_sha256=sha256_of(out / ENTRIES),
        **_train_statistics(receipts, pixels.size),
        splits={split: _describe(entries[entries["split"] == split]) for split in SPLITS},
        shards=tuple(receipt.shard for receipt in receipts),
        rejects=len(rejects),
        patients_in_two_splits=0,
    )
    publish_text(out / NAME, manifest.to_json())
    shutil.rmtree(out / _WORK)
    return manifest


def _start_or_resume(out: Path, identity: dict[str, Any]) -> None:
    plan_file = out / _WORK / "plan.json"
    if plan_file.is_file():
        _same_plan(out, identity, json.loads(plan_file.read_text(encoding="utf-8")))
        return
    if out.exists() and not out.is_dir():
        raise BadData(f"{out} is a file; give a folder for the shards")
    if out.is_dir() and any(path.name != _WORK for path in out.iterdir()):
        raise BadData(f"{out} holds other files and no shards; give an empty or new folder")
    publish_text(plan_file, json.dumps(identity))


def _same_plan(out: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    now, then = ({**side["recipe"], "metadata CSV": side["source_sha256"]} for side in (wanted, found))
    differing = [
        f"{key} was {then.get(key)}, is now {now.get(key)}"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise CannotResume(
            f"{out} was packed otherwise: {'; '.join(differing)}. Give another folder for this one"
        )


def _tasks(plan: Plan, out: Path, pixels: PixelRecipe, shard_size: int) -> list[ShardTask]:
    planned = plan.table
    labels = planned[list(FINDINGS)].to_numpy(dtype=np.uint8)
    paths = (str(plan.source) + "/" + planned["folder"] + "/" + planned["image"]).tolist()
    tasks = []
    for split in SPLITS:
        rows = np.flatnonzero(planned["split"] == split)
        for number, start in enumerate(range(0, len(rows), shard_size)):
            name = f"{split}-{number:05d}"
            samples = [
                (int(row), paths[row], labels[row].tobytes()) for row in rows[start : start + shard_size]
            ]
            tasks.append(ShardTask(out / f"{name}.tar", out / _WORK / f"{name}.json", samples, pixels))
    return tasks


def _run(tasks: list[ShardTask], jobs: int) -> list[Receipt]:
    receipts = {task.tar: receipt for task in tasks if (receipt := read_receipt(task))}
    todo = [task for task in tasks if task.tar not in receipts]
    with progress_bar(sum(len(task.samples) for task in tasks), "packing", "img") as bar:
        bar.update(sum(len(task.samples) for task in tasks if task.tar in receipts))
        for task, receipt in _map_tasks(todo, jobs):
            receipts[task.tar] = receipt
            bar.update(len(task.samples))
    return [receipts[task.tar] for task in tasks]


def _map_tasks(tasks: list[ShardTask], jobs: int) -> Iterator[tuple[ShardTask, Receipt]]:
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, pack_shard(task)) for task in tasks)
        return
    # spawn: the caller may have threads (DALI, torch), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _end_with_parent)
    try:
        futures = {pool.submit(pack_shard, task): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ResourceMissing(
            "a packing process was killed (out of memory?); the same command again goes on, "
            "with --jobs 1 in the least memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    # A worker that outlived a killed command would write on, beside the command that resumes.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _train_statistics(receipts: list[Receipt], size: int) -> dict[str, float]:
    train = [receipt for receipt in receipts if receipt.shard.name.startswith("train-")]
    pixels = max(sum(receipt.shard.samples for receipt in train) * size * size, 1)
    mean = sum(receipt.pixel_sum for receipt in train) / pixels
    square_mean = sum(receipt.pixel_square_sum for receipt in train) / pixels
    return {"mean": mean, "std": float(np.sqrt(max(square_mean - mean * mean, 0.0)))}


def _describe(entries: pd.DataFrame) -> SplitRecord:
    return SplitRecord(
        images=len(entries),
        patients=entries["patient"].nunique(),
        positives={finding: int(entries[finding].sum()) for finding in FINDINGS},
    )


def _entry_columns() -> list[str]:
    return ["image", "patient", "split", *FINDINGS, "age", "sex", "view", "follow_up", "folder"]


def _write_rejects(out: Path, planned: pd.DataFrame, rejects: dict[int, str]) -> None:
    rows = sorted(rejects)
    table = pd.DataFrame({"image": planned["image"].loc[rows], "reason": [rejects[row] for row in rows]})
    publish_text(out / REJECTS, table.to_csv(index=False, lineterminator="\n"))
