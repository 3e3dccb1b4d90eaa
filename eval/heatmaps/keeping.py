"""Heat maps on disk: a gallery and a localization as files, read back where they are what was asked for."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from eval.heatmaps.gallery import HeatMap
from eval.heatmaps.localization import Localization
from eval.result_files import remove, write_json
from shards.documents import convert, read_bytes, read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write, atomic_write_text, sha256_of

# Goes up when the same weights on the same images get other heat maps, or the files another form.
_FORMAT = 1
_GALLERY, _LOCALIZATION = "gallery.json", "localization.json"
_Share = Annotated[float, Meta(ge=0, le=1)]


class _Kept(TypedDict):
    file: str
    sha256: str
    image: str
    finding: str
    kind: str
    probability: _Share
    threshold: _Share


def keep_gallery(folder: Path, proof: dict[str, Any], maps: Iterable[HeatMap]) -> None:
    """Write the pictures as NUMBER_KIND_FINDING.png and, last, gallery.json: what they are, and the proof.

    `proof` is all that decides them, as JSON values. Pictures of an earlier gallery are removed.
    """
    records = []
    for number, shown in enumerate(maps, start=1):
        name = f"{number:02d}_{shown.kind}_{shown.finding}.png".replace(" ", "_")
        with atomic_write(folder / name) as partial:
            partial.write_bytes(shown.png)
        records.append(
            {
                "file": name,
                "sha256": hashlib.sha256(shown.png).hexdigest(),
                "image": shown.image,
                "finding": shown.finding,
                "kind": shown.kind,
                "probability": shown.probability,
                "threshold": shown.threshold,
            }
        )
    _note(folder / _GALLERY, proof, maps=records)
    named = {record["file"] for record in records}
    for left in folder.glob("*.png"):
        if left.name not in named:
            left.unlink()


def read_gallery(folder: Path, proof: dict[str, Any]) -> tuple[HeatMap, ...] | None:
    """Return the gallery that was kept with this very proof, None where none is or a file was changed."""
    record = _noted(folder / _GALLERY, proof)
    if record is None:
        return None
    maps = []
    try:
        for each in convert(record.get("maps"), list[_Kept], folder / _GALLERY):
            png = read_bytes(folder / Path(each["file"]).name)
            if hashlib.sha256(png).hexdigest() != each["sha256"]:
                return None
            numbers = each["probability"], each["threshold"]
            maps.append(HeatMap(each["image"], each["finding"], each["kind"], *numbers, png))
    except (BadData, ResourceMissing):  # as good as none: it is made again
        return None
    return tuple(maps)


def remove_other_gallery(folder: Path, proof: dict[str, Any]) -> None:
    """Remove the gallery, unless it was kept with a proof that says all of this one, and maybe more.

    Raises ResourceMissing from the disk.
    """
    kept = _read(folder / _GALLERY).get("proof")
    if not isinstance(kept, dict) or not proof.items() <= kept.items():
        remove(folder, [_GALLERY, "*.png"])


def keep_localization(folder: Path, proof: dict[str, Any], found: Localization) -> None:
    """Write localization.csv and, last, localization.json with the proof: all that decides it."""
    path = folder / "localization.csv"
    atomic_write_text(path, found.to_csv())
    _note(folder / _LOCALIZATION, proof, csv_sha256=sha256_of(path))


def read_localization(folder: Path, proof: dict[str, Any]) -> Localization | None:
    """Return the localization that was kept with this very proof, None where none is or it was changed."""
    record, path = _noted(folder / _LOCALIZATION, proof), folder / "localization.csv"
    if record is None or not path.is_file() or record.get("csv_sha256") != sha256_of(path):
        return None
    try:
        return Localization.from_csv(path)
    except BadData:  # as good as none: it is made again
        return None


def _note(path: Path, proof: dict[str, Any], **content: Any) -> None:
    write_json(path, {"format": _FORMAT, "proof": proof, **content})


def _noted(path: Path, proof: dict[str, Any]) -> dict[str, Any] | None:
    record = _read(path)
    return record if (record.get("format"), record.get("proof")) == (_FORMAT, proof) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict[str, Any])
    except (BadData, ResourceMissing):  # none, or one that was cut off
        return {}
