"""Fetching from a server on this machine that does what servers do on bad days."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards.errors import BadData, CannotResume, ResourceMissing
from shards.fetching import Fetched, fetch_shards
from shards.files import exclusive_lock
from shards.folder import open_shards
from shards.verification import verify_shards
from tests.serving import Handler, Server, breaks

TAR = "train-00001.tar"


def fetch(url: str | Path, dest: Path, retries: int = 2, jobs: int = 2, **options: Any) -> Fetched:
    return fetch_shards(str(url), dest, jobs=jobs, retries=retries, backoff=0, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_fetched_folder_is_byte_for_byte_the_one_that_was_packed(
    server: Server, packed: Path, dest: Path, jobs: int
) -> None:
    assert fetch(server.url, dest, jobs=jobs).files == 12
    assert contents(dest) == contents(packed)
    assert verify_shards(dest).faults == ()
    assert sorted(server.asked) == sorted(contents(packed))


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_path_and_a_file_url_are_fetched_as_well(packed: Path, dest: Path, form: str) -> None:
    fetch(form.format(packed), dest)
    assert contents(dest) == contents(packed)


def test_whatever_fsspec_knows_is_fetched_as_well(packed: Path, dest: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(packed), "/bucket/shards", recursive=True)
    try:
        fetch("memory://bucket/shards", dest)
        assert contents(dest) == contents(packed)
        store.rm(f"/bucket/shards/{TAR}")
        shutil.rmtree(dest)
        with pytest.raises(BadData, match=rf"memory://bucket/shards/{TAR} is not there"):
            fetch("memory://bucket/shards", dest)
    finally:
        store.rm("/bucket", recursive=True)


def test_a_second_run_asks_for_the_manifest_alone_and_writes_nothing(server: Server, dest: Path) -> None:
    fetch(server.url, dest)
    server.asked.clear()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (dest, *dest.iterdir())}
    assert fetch(server.url, dest).files == 0
    assert server.asked == ["manifest.json"]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (dest, *dest.iterdir())} == before


def test_a_file_that_was_lost_or_damaged_here_is_fetched_again(server: Server, packed: Path, dest: Path) -> None:
    fetch(server.url, dest)
    (dest / TAR).unlink()
    (dest / "train-00000.idx").write_bytes(b"x")
    assert fetch(server.url, dest).files == 2
    assert contents(dest) == contents(packed)


def test_a_file_whose_connection_breaks_is_begun_anew(server: Server, packed: Path, dest: Path) -> None:
    server.answers = {TAR: breaks(TAR, 2)}
    fetch(server.url, dest, retries=2)
    assert contents(dest) == contents(packed)
    assert server.asked.count(TAR) == 3


def test_after_the_last_retry_what_is_finished_is_kept_and_the_next_call_fetches_the_rest(
    server: Server, packed: Path, dest: Path
) -> None:
    server.answers = {TAR: breaks(TAR, 2)}
    with pytest.raises(ResourceMissing, match=rf"cannot fetch {TAR} from {server.url}: .* body .*; .*same com"):
        fetch(server.url, dest, retries=1, jobs=1)
    kept = contents(dest)
    assert "train-00000.tar" in kept and kept.items() <= contents(packed).items()
    assert not {"manifest.json", TAR} & kept.keys()
    with pytest.raises(BadData, match="no shards in"):
        open_shards(dest)
    server.asked.clear()
    fetch(server.url, dest)
    assert sorted(server.asked) == sorted({"manifest.json", *contents(packed)} - kept.keys())
    assert contents(dest) == contents(packed)


@pytest.mark.parametrize("name", [f".{TAR}.partial", f".{TAR}.0123abcd.partial", ".manifest.json.42.partial"])
def test_what_a_killed_fetch_left_is_removed(server: Server, packed: Path, dest: Path, name: str) -> None:
    dest.mkdir()
    shutil.copy(packed / TAR, dest / name)
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_answer_of_the_moment_is_tried_again(server: Server, packed: Path, dest: Path, status: int) -> None:
    server.fails = {"manifest.json": [status], TAR: [status, status]}
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


def test_an_answer_that_stays_bad_ends_in_exit_4(server: Server, dest: Path) -> None:
    server.fails = {TAR: [503] * 3}
    with pytest.raises(ResourceMissing, match=rf"cannot fetch {TAR} .*503 Service Unavailable; .*same command"):
        fetch(server.url, dest)
    assert "manifest.json" not in finished(dest)


def test_a_file_that_may_not_be_read_is_not_tried_again(server: Server, dest: Path) -> None:
    server.fails = {TAR: [403]}
    with pytest.raises(ResourceMissing, match=rf"{TAR} may not be read \(403 Forbidden\)"):
        fetch(server.url, dest)
    assert server.asked.count(TAR) == 1


@pytest.mark.parametrize("name", ["manifest.json", TAR, "train-00001.idx", "rejects.csv"])
def test_a_file_that_is_not_there_is_named(server: Server, dest: Path, name: str) -> None:
    server.fails = {name: [404]}
    with pytest.raises(BadData, match=rf"{server.url}/{name} is not there \(404 Not Found\)"):
        fetch(server.url, dest)
    assert not (dest / "manifest.json").exists()


@pytest.mark.parametrize("name", [TAR, "train-00001.idx", "entries.csv", "rejects.csv"])
@pytest.mark.parametrize("how", ["other", "longer", "shorter"])
def test_a_file_with_other_bytes_is_named_and_not_kept(
    server: Server, packed: Path, dest: Path, name: str, how: str
) -> None:
    data = (packed / name).read_bytes()
    server.replaced = {name: {"other": data[:-1] + b"\1", "longer": data + b"\0" * 512, "shorter": data[:-5]}[how]}
    with pytest.raises(BadData, match=rf"{server.url}/{name} (is not the file that the man|has more than the)"):
        fetch(server.url, dest)
    assert not (dest / name).exists()
    assert [path for path in dest.iterdir() if path.name.startswith(".")] == []
    assert not (dest / "manifest.json").exists()
    server.replaced.clear()
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"train-00000.tar"', b'"../x/train-00000.tar"', r"names '\.\./x/train-00000\.tar', which is no shard"),
        (b'"rejects": 0', b'"rejects": 1', "its text is not the one that its sha256 was made of"),
        (b"{", b"[", "is damaged"),
    ],
)
def test_a_manifest_that_is_not_to_be_trusted_stops_before_anything_is_written(
    server: Server, packed: Path, dest: Path, old: bytes, new: bytes, message: str
) -> None:
    server.replaced = {"manifest.json": (packed / "manifest.json").read_bytes().replace(old, new, 1)}
    with pytest.raises(BadData, match=message) as error:
        fetch(server.url, dest)
    assert error.value.message.startswith(f"{server.url}/manifest.json")
    assert not dest.exists() and server.asked == ["manifest.json"]


def test_other_shards_or_files_here_are_not_touched(server: Server, packed: Path, dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.txt").touch()
    with pytest.raises(CannotResume, match=r"holds thesis\.txt, which .* has not"):
        fetch(server.url, dest)
    assert finished(dest) == ["thesis.txt"]


def test_another_shard_folder_here_is_not_touched(server: Server, phantom_shards: object, packed: Path) -> None:
    folder = phantom_shards.path  # type: ignore[attr-defined]
    before = contents(folder)
    with pytest.raises(CannotResume, match="holds other shards than"):
        fetch(server.url, folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_refused(server: Server, dest: Path) -> None:
    dest.write_text("in the way")
    with pytest.raises(BadData, match="is a file, where a folder is needed"):
        fetch(server.url, dest)


def test_two_commands_at_once_do_not_write_into_one_folder(server: Server, dest: Path) -> None:
    with exclusive_lock(dest), pytest.raises(ResourceMissing, match="another command is"):
        fetch(server.url, dest)
    assert list(dest.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://127.0.0.1:1/x", ResourceMissing, r"cannot fetch manifest\.json from .*Connect call failed"),
        ("http://[::1/x", BadData, "is no URL"),
        ("http://", BadData, "is no URL"),
        ("http://127.0.0.1:99999999999999999999", ResourceMissing, r"cannot fetch manifest\.json"),
        ("file://[x", BadData, "is no URL"),
        ("nowhere/at/all", BadData, r"nowhere/at/all/manifest\.json is not there"),
        ("sesame://x", BadData, "Protocol not known: sesame"),
    ],
)
def test_a_url_that_leads_nowhere_says_so(
    dest: Path, monkeypatch: pytest.MonkeyPatch, url: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(error, match=message):
        fetch(url, dest)
    assert not dest.exists()


@pytest.mark.parametrize(
    "name", [TAR, "entries.csv", f".{TAR}.partial", f".{TAR}.abc.partial", ".manifest.json.partial", ".partial"]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_folder_is_not_followed(
    server: Server, tmp_path: Path, dest: Path, name: str, there: bool
) -> None:
    victim = tmp_path / "victim"
    if there:
        victim.write_text("mine")
    dest.mkdir()
    (dest / name).symlink_to(victim)
    with pytest.raises(CannotResume, match=rf"{dest}/{name} is a link or a folder, not a file"):
        fetch(server.url, dest)
    assert victim.read_text() == "mine" if there else not victim.exists()
    assert list(dest.iterdir()) == [dest / name] and server.asked == ["manifest.json"]


def test_a_link_that_appears_while_fetching_is_not_written_through(server: Server, tmp_path: Path, dest: Path) -> None:
    victim = tmp_path / "victim"

    def plant(handler: Handler) -> None:
        for name in (TAR, f".{TAR}.partial"):
            (dest / name).symlink_to(victim)
        handler.give((server.folder / "entries.csv").read_bytes())

    server.answers = {"entries.csv": plant}
    with contextlib.suppress(ResourceMissing):  # where the link has the temporary file's name
        fetch(server.url, dest, jobs=1)
    assert not victim.exists()


class BrokenStore(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store that fails where the first part of its path says, with the exception that the second names."""

    cachable = False
    protocol = "broken"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fail("create", options.get("fo", ""))

    @staticmethod
    def fail(where: str, path: str) -> None:
        if where in path:
            raise {
                "credentials": RuntimeError("Unable to locate\n  credentials"),
                "missing": FileNotFoundError(path),
                "forbidden": PermissionError("Forbidden"),
                "silly": KeyError("x"),
                "empty": Exception(),
            }[path.split("-")[1].split("/")[0]]

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        return {"fo": url}

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        self.fail("open", path)
        return BrokenFile(path)


class BrokenFile:
    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, _: int) -> bytes:
        BrokenStore.fail("read", self.path)
        return b""

    def close(self) -> None:
        pass


@pytest.mark.parametrize("where", ["create", "open", "read"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("credentials", "Unable to locate credentials"),
        ("missing", "is not there|missing"),
        ("forbidden", "Forbidden"),
        ("silly", "x"),
        ("empty", "Exception"),
    ],
)
def test_whatever_a_store_raises_becomes_one_line(dest: Path, where: str, how: str, said: str) -> None:
    fsspec.register_implementation("broken", BrokenStore, clobber=True)
    url = f"broken://{where}-{how}/shards"
    with pytest.raises((BadData, ResourceMissing), match=f"{url}.*{said}") as error:
        fetch(url, dest)
    assert "\n" not in error.value.message
    assert not dest.exists()
