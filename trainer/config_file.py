"""Options from a file: TOML, a run's config.json, or a recipe that ships with the package."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shards.documents import Value, convert, read_json, read_toml
from trainer.run_directory import LARGEST_CONFIG

_RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(file.stem for file in _RECIPES.glob("*.toml"))


def read_options(source: str) -> dict[str, str]:
    """Return option -> value as the command line would have it.

    `source` is the name of a recipe or the path of a file. In TOML a key is an option's name, with - or _;
    a list stands for comma-separated values. Raises UsageError if there is no such file, BadData naming file
    and key if it is damaged or holds anything nested.
    """
    path = _RECIPES / f"{source}.toml" if source in recipes() else Path(source)
    if not path.is_file():
        raise click.UsageError(
            f"--config {source} is no file; it takes a TOML file, a run's config.json, or one of the recipes "
            f"{', '.join(recipes())}"
        )
    is_json = path.suffix == ".json"
    found = read_json(path, dict[str, Any], largest=LARGEST_CONFIG) if is_json else read_toml(path)
    return {key.replace("-", "_"): _text(convert(found[key], _VALUE, f"{path}, {key[:64]}")) for key in found}


@dataclass(frozen=True)
class _Option:
    """An option in a run's config.json."""

    value: Value


_VALUE: Any = Value | _Option


def _text(value: Any) -> str:
    if isinstance(value, _Option):
        value = value.value
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def use_file(context: click.Context, parameter: click.Parameter, source: str | None) -> str | None:
    """Make a file's options the defaults of a command: the callback of its eager option --config.

    Raises UsageError for a key that is no option, naming the nearest, and for an invalid value.
    """
    if source is None:
        return None
    own = {"config", "dry_run", "help"}
    known = {
        spelling.lstrip("-").replace("-", "_"): each
        for each in context.command.params
        if each.name not in own
        for spelling in each.opts
    }
    options = {}
    for key, value in read_options(source).items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise click.UsageError(f"{source} sets {key!r}, which is no option; the nearest is {nearest[0]!r}")
        try:
            known[key].type_cast_value(context, value)
        except click.BadParameter as error:
            raise click.UsageError(f"{source}: {key}: {error.message}") from error
        options[str(known[key].name)] = value
    context.default_map = {**(context.default_map or {}), **options}
    return source
