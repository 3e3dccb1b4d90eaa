"""Decide from an NIH tree and options which entry goes where, before any pixel is read, and say what looks odd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from shards.boxes import find_box_list, read_box_list
from shards.console import echo
from shards.entries import find_images, image_folders, read_entries, unpacking_hint
from shards.errors import BadData
from shards.files import sha256_of
from shards.splits import (
    RANDOM_FRACTIONS,
    SPLITS,
    VAL_FRACTION,
    Names,
    read_list,
    split_by_lists,
    split_official,
    split_random,
    verify_disjoint,
)

SplitRule = Literal["official", "random", "file"]
ODDITIES = {
    "enlarged": "{} images are smaller than --size{}; enlarging adds no detail: pack them at their own size",
    "twelve_bits": "{} images have 16 bits but no value over 4095{}; such 12-bit images come out nearly "
    "black: multiply their pixels by 16 first",
    "unlisted": "{} images are in no row of the metadata{}; they are not packed",
    "other_patient": "{} images have another patient ID than the one in their name{}; if the ID is wrong, "
    "one person may be in two splits",
    "unknown_age": "{} ages are empty{}; they count as unknown and are -1 in entries.csv",
}
"""What looks wrong though it can be packed -> the message, with places for a count and an example."""


class Oddity(NamedTuple):
    """How many images are odd in one way."""

    images: int
    first: str = ""
    """The first image; empty where it is not known any more."""


@dataclass(frozen=True)
class SplitRecipe:
    """How entries are divided into train, val and test."""

    rule: SplitRule = "official"
    seed: int = 0
    val_fraction: float | None = None
    """Share of train_val's images for val (official, default 1/8), or of all images (random, 0.1)."""
    train_list: Path | None = None
    """official: NIH's train_val_list.txt if not in the source folder; file: the train images."""
    val_list: Path | None = None
    """official: images to hold out instead of drawing them; file: the val images."""
    test_list: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Which images are packed, in which order, into which split."""

    table: pd.DataFrame
    """Entries in packed order; the index is the row in entries.csv; columns of Entries.table
    plus `split` and `folder`."""
    findings: tuple[str, ...]
    source: Path
    source_sha256: str
    split_recipe: dict[str, Any]
    warnings: tuple[str, ...]
    boxes: pd.DataFrame | None = None
    """As `shards.boxes.read_box_list` returns it, of the planned images; None without a list of boxes."""
    oddities: Mapping[str, Oddity] = field(default_factory=dict)
    """What looks wrong though it can be packed, by its key in ODDITIES."""

    @property
    def images(self) -> list[str]:
        """Path of every image relative to `source`, in packed order."""
        return (self.table["folder"] + "/" + self.table["image"]).tolist()


def make_plan(
    source: Path,
    split: SplitRecipe,
    *,
    folders: Sequence[str] | None = None,
    allow_missing: bool = False,
    boxes: Path | None = None,
) -> Plan:
    """Read the tree at `source`, find its images, split it by patient and verify the split.

    `folders` names the image folders to pack (None: all). Raises BadData for bad metadata, for images that are listed
    but not on disk (unless `allow_missing`; images of folders that were not asked for are no error), for a patient in
    two splits, or an empty train split. `boxes` is a list of boxes (None: NIH's in `source`, if it is there), of which
    those of the planned images are kept and the number of the others is remarked on.
    """
    read = read_entries(source)
    if source.is_file():
        raise BadData(f"{source} is a file; give the folder that it and the images are in")
    table = read.table
    images = find_images(source, folders)
    table["folder"] = table["image"].map(images)
    missing = table["image"][table["folder"].isna()]
    if len(missing) and not allow_missing and folders is None:
        raise BadData(
            f"{len(missing)} of {len(table)} images are not in {source}, the first are "
            f"{', '.join(missing[:3])}{unpacking_hint(source) or '; finish the download'}, or pack what is "
            "there with --allow-missing"
        )
    table = table[table["folder"].notna()]
    if table.empty:
        raise BadData(
            f"no image of {read.csv} is in {source} (looked into images*/images, images* and itself)"
            f"{unpacking_hint(source)}"
        )
    unlisted = sorted(images.keys() - set(read.table["image"]))
    oddities = _find_oddities(table, [f"{images[name]}/{name}" for name in unlisted])
    names, lists = _split(table, source, split)
    patients = verify_disjoint(table, names)
    if not patients["train"]:
        raise BadData(f"the {split.rule} split of {source} leaves no patient for train")
    table = _packed_order(table.assign(split=names), split.seed)
    recipe = {"split": split.rule, "seed": split.seed, **lists}
    if folders is not None:
        recipe["folders"] = list(folders)
    if len(missing):
        recipe["missing_images"] = len(missing)
    box_list = boxes or find_box_list(source)
    listed, warnings = None, read.warnings
    if box_list is not None:
        listed = read_box_list(box_list)
        recipe["box_list_sha256"] = sha256_of(box_list)
        kept = listed["image"].isin(table["image"])
        if not kept.all():
            others = f"{(~kept).sum()} of {len(kept)} boxes are of images that are not packed here"
            warnings = (*warnings, f"{box_list}: {others}")
        listed = listed[kept]
    return Plan(table, read.findings, source, sha256_of(read.csv), recipe, warnings, listed, oddities)


def choose_folders(source: Path, choice: str) -> list[str]:
    """Return the image folders that `choice` means: `3` the first three, `3,7` the third and seventh."""
    names = image_folders(source)
    numbers = [int(text) for text in choice.split(",")]
    picked = list(range(1, numbers[0] + 1)) if len(numbers) == 1 else numbers
    if min(picked, default=0) < 1 or max(picked) > len(names):
        raise BadData(
            f"{source} has {len(names)} image folders; --folders {choice} asks for others"
            f"{unpacking_hint(source) if source.is_dir() else ''}"
        )
    return [names[number - 1] for number in picked]


def warn_of_oddities(found: Mapping[str, Oddity], *, strict: bool) -> None:
    """Print a warning for each of ODDITIES' kinds that was found; if `strict`, raise BadData with the first."""
    lines = [
        ODDITIES[kind].format(odd.images, f" (the first is {odd.first})" if odd.first else "")
        for kind, odd in found.items()
    ]
    for line in lines[strict:]:
        echo(f"warning: {line}", err=True)
    if strict and lines:
        raise BadData(f"{lines[0]}; --strict refuses them, without it they are packed")


def _find_oddities(table: pd.DataFrame, unlisted: list[str]) -> dict[str, Oddity]:
    # A name such as 00000017_003.png is taken to tell the patient where most names do.
    patients = table["image"].str.extract(r"^(\d{1,18})_\d+\.", expand=False)
    named = patients.notna()
    other = named & (patients.where(named, "-1").astype("int64") != table["patient"])
    if (named & ~other).sum() * 2 <= len(table):
        other &= False
    found = {
        "unlisted": unlisted,
        "other_patient": table["image"][other].tolist(),
        "unknown_age": table["image"][table["age"] < 0].tolist(),
    }
    return {kind: Oddity(len(images), images[0]) for kind, images in found.items() if images}


def _split(table: pd.DataFrame, source: Path, split: SplitRecipe) -> tuple[Names, dict[str, Any]]:
    # The names, and what of the recipe decided them.
    if split.rule == "random":
        shares = RANDOM_FRACTIONS
        if split.val_fraction is not None:
            shares = (1 - RANDOM_FRACTIONS[2] - split.val_fraction, split.val_fraction, RANDOM_FRACTIONS[2])
        return split_random(table, shares, split.seed), {"fractions": list(shares)}
    paths = {
        "train_list": split.train_list or source / "train_val_list.txt",
        "val_list": split.val_list,
        "test_list": split.test_list or source / "test_list.txt",
    }
    absent = [path for path in paths.values() if path is not None and not path.exists()]
    if split.rule == "official" and absent:
        raise BadData(
            f"cannot read the list {absent[0]}: there is no such file; it is part of the NIH download. "
            "Without it, --split random draws a split of its own, by patient"
        )
    lists = {key: read_list(path) for key, path in paths.items() if path is not None}
    recipe: dict[str, Any] = {f"{key}_sha256": sha256_of(path) for key, path in paths.items() if path is not None}
    if split.rule == "file" or split.val_list is not None:
        val = lists["val_list"]
        train = lists["train_list"] - val if split.rule == "official" else lists["train_list"]
        return split_by_lists(table, train, val, lists["test_list"]), recipe
    fraction = VAL_FRACTION if split.val_fraction is None else split.val_fraction
    recipe["val_fraction"] = fraction
    names = split_official(table, lists["train_list"], lists["test_list"], fraction, split.seed)
    return names, recipe


def _packed_order(entries: pd.DataFrame, seed: int) -> pd.DataFrame:
    # Train shuffled, so that each shard is a fair sample of it; val and test as in the metadata.
    order = {split: np.flatnonzero(entries["split"] == split) for split in SPLITS}
    order["train"] = np.random.default_rng(seed).permutation(order["train"])
    planned = entries.iloc[np.concatenate([order[split] for split in SPLITS])].reset_index(drop=True)
    return planned.rename_axis("row")
