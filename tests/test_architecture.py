"""The rooms of the house and which may know which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "shards": set(),
    "models": set(),
    "loaders": {"shards"},
    "trainer": {"shards", "loaders", "models"},
    "eval": {"shards", "loaders", "models", "trainer"},
}
ROOMS = {*MAY_IMPORT, "scripts", "benchmarks", "tests"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_before_it(room: str) -> None:
    known = {name for path in (ROOT / room).rglob("*.py") for name in imported(path)} & ROOMS
    assert known <= MAY_IMPORT[room] | {room}


def test_shards_never_import_torch() -> None:
    assert all("torch" not in imported(path) for path in (ROOT / "shards").rglob("*.py"))


def test_no_module_is_longer_than_400_lines() -> None:
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path for path in modules if path.read_text().count("\n") > 400] == []
