"""Verify a shard folder: `python scripts/verify_shards.py [SHARDS]`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import dataclasses
import json
from pathlib import Path

import click

from shards.console import JOBS, PATH, Command, echo
from shards.errors import BadData
from shards.files import atomic_write_text
from shards.processes import available_cores, graceful_exit
from shards.verification import Verification, verify_shards

MOST_SHOWN = 20


@click.command(cls=Command, context_settings={"show_default": True, "auto_envvar_prefix": "CXRAPID"})
@click.argument("shards", type=PATH, default="data/shards")
@click.option("--jobs", type=JOBS, default=None, metavar="N", help="Worker processes.  [default: one per core]")
@click.option(
    "--json",
    "record",
    envvar="CXRAPID_JSON",
    type=PATH,
    metavar="FILE",
    help="Also write the counts and every fault to this file.",
)
def main(shards: Path, jobs: int | None, record: Path | None) -> None:
    """Verify the shard folder SHARDS: every hash, every member, every label, every image, every split.

    Checks each file's SHA-256 against the manifest and each byte of each tar against entries.csv, decodes
    each image, and checks that no patient is in two splits. A fault exits with 3 and names shard, sample
    and cause. Only a missing .idx is written again.
    """
    with graceful_exit("nothing is verified"):
        found = verify_shards(shards, jobs=jobs or available_cores())
    if record is not None:
        atomic_write_text(record, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    for warning in found.warnings:
        echo(f"note: {warning}", err=True)
    if found.faults:
        raise BadData(_first(found))
    echo(
        f"{shards}: verified. {found.shards} shards, {found.samples} samples, {found.bytes / 1e9:.3f} GB: "
        "every file as packed, every label as in entries.csv, every image decoded"
    )
    patients = ", ".join(f"{split} {count}" for split, count in found.patients.items())
    echo(f"patients: {patients}; in two splits: 0")


def _first(found: Verification) -> str:
    first, *others = found.faults
    for fault in others[: MOST_SHOWN - 1]:
        echo(f"also: {fault}", err=True)
    if not others:
        return first
    shown = "listed above" if len(others) < MOST_SHOWN else f"the first {MOST_SHOWN - 1} listed above"
    return f"{first}; {len(others)} more fault{'s' * (len(others) > 1)}, {shown}"


if __name__ == "__main__":
    main()
