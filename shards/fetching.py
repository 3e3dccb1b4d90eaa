"""A shard folder brought here from elsewhere, each file proved before it gets its name."""

import concurrent.futures
import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from shards.boxes import BOXES
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.folder import ENTRIES, REJECTS
from shards.locking import only_one
from shards.manifest import NAME, Manifest, parse_manifest, read_manifest
from shards.origins import Origin, open_origin
from shards.progress import progress_bar
from shards.publishing import PARTIAL, publish_text, rename, sha256_of


@dataclass(frozen=True)
class Fetched:
    """What a fetch did."""

    manifest: Manifest
    files: int
    """How many were fetched now, without manifest.json; the others were here already."""


@dataclass(frozen=True)
class _File:
    name: str
    sha256: str
    bytes: int = 0
    """0: small, and not counted by the progress bar."""


@dataclass
class _Transfer:
    origin: Origin
    url: str
    retries: int
    backoff: float
    bar: "tqdm[object]"
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when one file cannot be had: the others then end, and keep what they have."""

    def advance(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)


def fetch_shards(url: str, dest: Path, *, jobs: int = 4, retries: int = 4, backoff: float = 1.0) -> Fetched:
    """Copy the shard folder at `url` to `dest`, `jobs` files at a time, and return what was done.

    A file gets its name when its SHA-256 is the manifest's, and manifest.json comes last: a
    half-fetched folder is never taken for a whole one. What broke off is kept and continued,
    by this call after a wait that begins with `backoff` seconds and doubles, and after
    `retries` waits in a row without a byte by the next call. Files that are here already are
    hashed and left alone, so that a second call transfers nothing but manifest.json.

    Raises BadData where a file's bytes are not those of the manifest, or the manifest is
    damaged or names what is no shard; ResourceMissing where the network or the disk fails, or
    another command is at work in `dest`; CannotResume where `dest` holds other shards or files.
    """
    with progress_bar(0, "fetching", "B", unit_scale=True, unit_divisor=1024) as bar:
        transfer = _Transfer(open_origin(url), url.rstrip("/"), retries, backoff, bar)
        manifest = _fetch_manifest(transfer)
        files = _files(manifest)
        with only_one(dest):
            _check_dest(dest, manifest, url, {NAME, *(file.name for file in files)})
            bar.reset(total=sum(file.bytes for file in files))
            fetched = _fetch_all(files, dest, transfer, jobs)
            if not (dest / NAME).is_file():
                publish_text(dest / NAME, manifest.to_json())
    return Fetched(manifest, fetched)


def _fetch_manifest(transfer: _Transfer) -> Manifest:
    # Not into the shard folder, where it comes last.
    with tempfile.TemporaryDirectory() as folder:
        _download(_File(NAME, ""), Path(folder) / NAME, transfer)
        return parse_manifest((Path(folder) / NAME).read_bytes(), f"{transfer.url}/{NAME}")


def _files(manifest: Manifest) -> list[_File]:
    files = [_File(ENTRIES, manifest.entries_sha256), _File(REJECTS, manifest.rejects_sha256)]
    if manifest.boxes_sha256 is not None:
        files.append(_File(BOXES, manifest.boxes_sha256))
    for shard in manifest.shards:
        files.append(_File(Path(shard.name).with_suffix(".idx").name, shard.idx_sha256))
        files.append(_File(shard.name, shard.sha256, shard.bytes))
    return files


def _check_dest(dest: Path, manifest: Manifest, url: str, names: set[str]) -> None:
    if (dest / NAME).is_file() and read_manifest(dest) != manifest:
        raise CannotResume(f"{dest} holds other shards than {url}; give another folder for these")
    expected = names | {_partial(dest / name).name for name in names}
    for found in sorted(dest.iterdir()):
        if found.name not in expected:
            raise CannotResume(f"{dest} holds {found.name}, which {url} has not; give an empty or new folder")


def _partial(path: Path) -> Path:
    # One name, by which the next call finds what this one has fetched.
    return path.with_name(f".{path.name}{PARTIAL}")


def _fetch_all(files: list[_File], dest: Path, transfer: _Transfer, jobs: int) -> int:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_fetch, file, dest / file.name, transfer) for file in files]
        try:
            return sum(future.result() for future in concurrent.futures.as_completed(futures))
        finally:
            transfer.stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch(file: _File, path: Path, transfer: _Transfer) -> bool:
    # Whether the file had to be fetched.
    if path.is_file() and sha256_of(path) == file.sha256:
        transfer.advance(file.bytes)
        return False
    partial = _partial(path)
    continued = partial.is_file()
    _download(file, partial, transfer)
    if continued and not transfer.stop.is_set() and sha256_of(partial) != file.sha256:
        # Its beginning may be of another version of the file, or torn by a power cut.
        transfer.advance(-partial.stat().st_size if file.bytes else 0)
        partial.unlink()
        _download(file, partial, transfer)
    if transfer.stop.is_set():
        return False
    if (found := sha256_of(partial)) != file.sha256:
        partial.unlink()
        raise BadData(
            f"{transfer.url}/{file.name} is not the file that the manifest names: its SHA-256 is "
            f"{found}, not {file.sha256}; the copy there is damaged, or something on the way changes it"
        )
    rename(partial, path)
    return True


def _download(file: _File, partial: Path, transfer: _Transfer) -> None:
    # Until `partial` has all that the source has, over as many connections as that takes.
    counted = bool(file.bytes)
    have = partial.stat().st_size if partial.is_file() else 0
    transfer.advance(have if counted else 0)
    failures = 0
    while not (transfer.stop.is_set() or (counted and have >= file.bytes)):
        before = have
        try:
            with transfer.origin.read(file.name, have) as reading, _writing(partial, reading.start) as write:
                transfer.advance(reading.start - have if counted else 0)
                have = reading.start
                for block in reading.blocks:
                    write(block)
                    have += len(block)
                    transfer.advance(len(block) if counted else 0)
                    if transfer.stop.is_set() or (counted and have > file.bytes):
                        break
                return
        except OSError as error:
            failures = 0 if have > before else failures
            if failures == transfer.retries:
                raise ResourceMissing(
                    f"cannot fetch {file.name} from {transfer.url}: {error}; what came is kept, "
                    "and the same command goes on"
                ) from error
            transfer.stop.wait(transfer.backoff * 2**failures)
            failures += 1


@contextlib.contextmanager
def _writing(partial: Path, start: int) -> Iterator[Callable[[bytes], object]]:
    # A disk that fails is no network that fails: nothing is tried again.
    def checked(block: bytes) -> None:
        try:
            file.write(block)
        except OSError as error:
            raise _cannot_write(partial, error) from error

    try:
        file = partial.open("ab", buffering=0)
        file.truncate(start)
    except OSError as error:
        raise _cannot_write(partial, error) from error
    with file:
        yield checked


def _cannot_write(partial: Path, error: OSError) -> ResourceMissing:
    return ResourceMissing(
        f"cannot write {partial}: {error.strerror or error}; make room, and the same command goes on"
    )
