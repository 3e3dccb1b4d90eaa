"""Count suspicious images that can still be packed, and name the first of each kind."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from shards.console import echo
from shards.errors import BadData

MESSAGES = {
    "enlarged": "{} images are smaller than --size{}; enlarging adds no detail: pack them at their own size",
    "twelve_bits": "{} images have 16 bits but no value over 4095{}; such 12-bit images come out nearly "
    "black: multiply their pixels by 16 first",
    "unlisted": "{} images are in no row of the metadata{}; they are not packed",
    "other_patient": "{} images have another patient ID than the one in their name{}; if the ID is wrong, "
    "one person may be in two splits",
    "unknown_age": "{} ages are empty{}; they count as unknown and are -1 in entries.csv",
}


class Oddity(NamedTuple):
    """How many images are odd in one way."""

    images: int
    first: str = ""
    """The first image; empty where it is not known any more."""


def report(found: Mapping[str, Oddity], *, strict: bool) -> None:
    """Print a line for each of MESSAGES' kinds that was found; if `strict`, raise BadData with the first."""
    lines = [
        MESSAGES[kind].format(odd.images, f" (the first is {odd.first})" if odd.first else "")
        for kind, odd in found.items()
    ]
    for line in lines[strict:]:
        echo(f"warning: {line}", err=True)
    if strict and lines:
        raise BadData(f"{lines[0]}; --strict refuses them, without it they are packed")


def find_oddities(table: pd.DataFrame, unlisted: list[str]) -> dict[str, Oddity]:
    """Return what is odd about planned entries and about the images that are in no row.

    A name such as 00000017_003.png is taken to tell the patient where most names do.
    """
    patients = table["image"].str.extract(r"^(\d{1,18})_\d+\.", expand=False)
    told = patients.notna()
    other = told & (patients.where(told, "-1").astype("int64") != table["patient"])
    if (told & ~other).sum() * 2 <= len(table):
        other &= False
    found = {
        "unlisted": unlisted,
        "other_patient": table["image"][other].tolist(),
        "unknown_age": table["image"][table["age"] < 0].tolist(),
    }
    return {kind: Oddity(len(images), images[0]) for kind, images in found.items() if images}
