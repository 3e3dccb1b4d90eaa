"""The README's tree names every module and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("shards", "loaders", "models", "trainer", "eval", "scripts", "benchmarks")


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named = re.findall(r"^\s+(\w+\.py) ", tree, re.MULTILINE)
    there = [path.name for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)
