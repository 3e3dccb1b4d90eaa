"""Download a shard folder; each file is verified before it gets its name."""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import io
import shutil
import stat
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from tqdm import tqdm

from shards.boxes import BOXES
from shards.console import progress_bar
from shards.csv_tables import largest_table
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.files import PARTIAL, atomic_write, atomic_write_text, exclusive_lock, sha256_of
from shards.folder import ENTRIES, REJECTS
from shards.index import largest_index
from shards.manifest import LARGEST, NAME, Manifest, parse_manifest, read_manifest
from shards.remote import RemoteFolder, open_remote

P = ParamSpec("P")
T = TypeVar("T")

_MAX_ROWS = 2**20
"""Rows of a table, so that made-up counts come to 1 GiB at most. In packed phantoms a row of entries.csv has 150 bytes,
of rejects.csv 120, of boxes.csv 50, of which an image may have several."""
_MAX_BACKOFF = 60.0  # seconds between two tries
_MAX_TIMEOUT = 86400  # seconds
_CLEANUP_TIMEOUT = 3.0  # in which a transfer that is broken off removes its temporary files


@dataclass(frozen=True)
class Fetched:
    """What a fetch did."""

    manifest: Manifest
    files: int
    """How many were fetched now, without manifest.json; the others were here already."""


def fetch_shards(
    url: str,
    dest: Path,
    *,
    jobs: int = 4,
    retries: int = 4,
    backoff: float = 1.0,
    idle_timeout: float = 60.0,
    min_rate: int = 16 * 2**10,
) -> Fetched:
    """Copy the shard folder at `url` to `dest`, `jobs` files at a time, and return what was done.

    A file gets its name when its SHA-256 is the manifest's, and manifest.json comes last: a half-fetched folder is
    never taken for a whole one. Files that are here already are hashed and left alone, so that a second call transfers
    only what is missing. A transfer breaks off where no byte comes for `idle_timeout` seconds, or a file takes longer
    than twice that and `min_rate` bytes/s (by default what each of four files has of 0.5 Mbit/s); it is begun anew,
    `retries` times after waits that begin with `backoff` seconds and double. No file may have more bytes than the
    manifest lets expect. An exception that a signal's handler raises ends the transfer at once.

    Raises BadData where a file's bytes are not those of the manifest, or the manifest is damaged or names what is no
    shard; ResourceMissing where the network or the disk fails, or another command is at work in `dest`; CannotResume
    where `dest` holds other shards or files, or links.
    """
    with progress_bar(0, "fetching", "B", unit_scale=True, unit_divisor=1024) as bar:

        async def fetch() -> Fetched:
            async with open_remote(url, idle_timeout) as origin:
                transfer = _Transfer(origin, url.rstrip("/"), retries, backoff, idle_timeout, min_rate, bar)
                return await _fetch_folder(transfer, dest, jobs)

        return _run_in_thread(fetch)


@dataclass(frozen=True)
class _File:
    name: str
    sha256: str
    max_bytes: int
    """Bytes that it may have; of a tar, those that it has."""


@dataclass(frozen=True)
class _Transfer:
    origin: RemoteFolder
    url: str
    retries: int
    backoff: float
    idle_timeout: float
    min_rate: int
    bar: "tqdm[object]"

    def count(self, file: _File, size: int) -> None:
        """Show that `size` bytes are here; of tars only, since only their size is known before."""
        if file.name.endswith(".tar"):
            self.bar.update(size)

    async def copy(self, file: _File, out: BinaryIO) -> str:
        """Write a file to `out`, again where it breaks off; return its SHA-256."""
        wait = self.backoff
        # A manifest's numbers may be too large for a float.
        seconds = min(2 * self.idle_timeout + min(file.max_bytes // self.min_rate, _MAX_TIMEOUT), _MAX_TIMEOUT)
        for left in reversed(range(self.retries + 1)):
            try:
                return await asyncio.wait_for(self._copy_once(file, out), seconds)
            except asyncio.TimeoutError:
                cause = f"it takes longer than {seconds:.0f} s, slower than {self.min_rate:,} bytes/s"
            except ConnectionError as error:
                cause = str(error)
            if left:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)
        raise ResourceMissing(
            f"cannot fetch {file.name} from {self.url}: {cause}; the finished files are kept: "
            "run the same command to continue"
        )

    async def _copy_once(self, file: _File, out: BinaryIO) -> str:
        out.seek(0)
        out.truncate()
        digest, size = hashlib.sha256(), 0
        try:
            async with contextlib.aclosing(self.origin(file.name)) as blocks:
                async for block in blocks:
                    size += len(block)
                    self.count(file, len(block))
                    if size > file.max_bytes:
                        url = f"{self.url}/{file.name}"
                        raise BadData(f"{url} has more than the {file.max_bytes:,} bytes that it may have")
                    out.write(block)
                    digest.update(block)
        except BaseException:
            self.count(file, -size)
            raise
        return digest.hexdigest()


async def _fetch_folder(transfer: _Transfer, dest: Path, jobs: int) -> Fetched:
    text = io.BytesIO()  # not into the shard folder, where it comes last
    await transfer.copy(_File(NAME, "", LARGEST), text)
    manifest = parse_manifest(text.getvalue(), f"{transfer.url}/{NAME}")
    files = _files(manifest)
    with exclusive_lock(dest):
        _check_dest(dest, manifest, transfer.url, {NAME, *(file.name for file in files)})
        transfer.bar.reset(total=sum(shard.bytes for shard in manifest.shards))
        fetched = await _fetch_all(files, dest, transfer, jobs)
        if not (dest / NAME).is_file():
            atomic_write_text(dest / NAME, manifest.to_json())
    return Fetched(manifest, fetched)


def _files(manifest: Manifest) -> list[_File]:
    images = largest_table(min(sum(split.images for split in manifest.splits.values()), _MAX_ROWS))
    files = [
        _File(ENTRIES, manifest.entries_sha256, images),
        _File(REJECTS, manifest.rejects_sha256, largest_table(min(manifest.rejects, _MAX_ROWS))),
    ]
    if manifest.boxes_sha256 is not None:
        files.append(_File(BOXES, manifest.boxes_sha256, images))
    for shard in manifest.shards:
        idx = Path(shard.name).with_suffix(".idx").name
        # An index is smaller than its tar, whatever the manifest says that both hold.
        files.append(_File(idx, shard.idx_sha256, min(largest_index(shard.samples), shard.bytes)))
        files.append(_File(shard.name, shard.sha256, shard.bytes))
    return files


def _check_dest(dest: Path, manifest: Manifest, url: str, names: set[str]) -> None:
    # And remove what a fetch that was killed has left, as whoever holds the lock may.
    found = sorted(dest.iterdir())
    for path in found:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CannotResume(f"{path} is a link or a folder, not a file; give an empty or new folder")
    if (dest / NAME).is_file() and read_manifest(dest) != manifest:
        raise CannotResume(f"{dest} holds other shards than {url}; give another folder for these")
    beginnings = tuple(f".{name}." for name in names)
    left = [path for path in found if path.name.startswith(beginnings) and path.name.endswith(PARTIAL)]
    for path in found:
        if path.name not in names and path not in left:
            raise CannotResume(f"{dest} holds {path.name}, which {url} has not; give an empty or new folder")
    for path in left:
        path.unlink()
    missing = sum(shard.bytes for shard in manifest.shards if not (dest / shard.name).is_file())
    if missing > (free := shutil.disk_usage(dest).free):
        raise ResourceMissing(
            f"{dest} has room for {free:,} bytes, the missing shards have {missing:,}; make room, or give "
            "another folder"
        )


async def _fetch_all(files: list[_File], dest: Path, transfer: _Transfer, jobs: int) -> int:
    left = iter(files)

    async def fetch_some() -> int:
        return sum([await _fetch(file, dest / file.name, transfer) for file in left])

    tasks = [asyncio.create_task(fetch_some()) for _ in range(min(jobs, len(files)))]
    try:
        return sum(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _fetch(file: _File, path: Path, transfer: _Transfer) -> bool:
    # Whether the file had to be fetched.
    if path.is_file() and await asyncio.to_thread(sha256_of, path) == file.sha256:
        transfer.count(file, file.max_bytes)
        return False
    with atomic_write(path) as partial, partial.open("wb") as out:
        found = await transfer.copy(file, out)
        if found != file.sha256:
            raise BadData(
                f"{transfer.url}/{file.name} is not the file that the manifest names: its SHA-256 is "
                f"{found}, not {file.sha256}; the copy there is damaged, or something on the way changes it"
            )
    return True


class _DaemonExecutor(concurrent.futures.ThreadPoolExecutor):
    """A thread a call, for which neither asyncio waits when a loop ends nor Python when it exits.

    A name server, a store's library or a network disk that does not answer can hold one for minutes.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "concurrent.futures.Future[T]":
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def _run_in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on an event loop in another thread, and break it off where a signal raises here.

    In the loop's own thread asyncio's callbacks could swallow what the handler of a signal raises.
    """
    threads = _DaemonExecutor()
    begun: concurrent.futures.Future[Callable[[], object]] = concurrent.futures.Future()

    async def run() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        loop.set_default_executor(threads)
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))  # type: ignore[union-attr]
        return await work()

    done = threads.submit(lambda: asyncio.run(run()))
    try:
        return done.result()
    except BaseException:
        if not done.done():
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                begun.result()()
            concurrent.futures.wait([done], _CLEANUP_TIMEOUT)
        raise
