"""Options from a file: TOML, a run's config.json, or a recipe that ships with the package."""

import difflib
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RECIPES = resources.files("trainer.config") / "recipes"


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(
        file.name.removesuffix(".toml") for file in _RECIPES.iterdir() if file.name.endswith(".toml")
    )


def read_options(source: str) -> dict[str, str]:
    """Return option -> value as the command line would have it.

    `source` is the name of a recipe or the path of a file. In TOML an option is a key of its name, with
    - or _; a list stands for values with commas between. Raises UsageError where it cannot be read.
    """
    path = Path(source)
    try:
        if source in recipes():
            text = (_RECIPES / f"{source}.toml").read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(found, dict):
            raise ValueError("no options in it")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(
            f"--config {source} cannot be read ({reason}); it takes a TOML file, a run's config.json, or "
            f"one of the recipes {', '.join(recipes())}"
        ) from error
    return {key.replace("-", "_"): _text(value) for key, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict) and "value" in value:  # an option of a run's config.json
        value = value["value"]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def use_file(context: click.Context, parameter: click.Parameter, source: str | None) -> str | None:
    """Make a file's options the defaults of a command: the callback of its eager option --config.

    Raises UsageError for a key that is no option, naming the nearest, and for a value that its option
    does not take.
    """
    if source is None:
        return None
    own = {"config", "dry_run", "help"}
    known = {each.name: each for each in context.command.params if each.name and each.name not in own}
    options = read_options(source)
    for key, value in options.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise click.UsageError(
                f"{source} sets {key!r}, which is no option; the nearest is {nearest[0]!r}"
            )
        try:
            known[key].type_cast_value(context, value)
        except click.BadParameter as error:
            raise click.UsageError(f"{source}: {key}: {error.message}") from error
    context.default_map = {**(context.default_map or {}), **options}
    return source
