"""Where a shard folder can be fetched from: a web server, another folder, or an object store."""

import contextlib
import http.client
import importlib
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.errors import BadData, ResourceMissing

BLOCK = 1 << 18  # bytes
_TIMEOUT = 60.0  # seconds without a byte
# What a server says of itself for the moment, not of the file: worth another try.
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class Reading(NamedTuple):
    """A file being read."""

    start: int
    """The byte that the first block begins with: the one asked for, or 0."""
    blocks: Iterator[bytes]
    """To the end of the file. Raises OSError where that is not reached."""


class Origin(Protocol):
    """A folder somewhere."""

    def read(self, name: str, start: int) -> contextlib.AbstractContextManager[Reading]:
        """Open a file at byte `start`, or at 0 where its server does not know how.

        Raises OSError for what may pass when tried again (also while the blocks are read),
        BadData where there is no such file, ResourceMissing where it may not be read.
        """


def open_origin(url: str) -> Origin:
    """Return the folder at `url`: http(s)://, file://, a path, or whatever fsspec knows (s3://, gs://).

    Raises ResourceMissing where fsspec, or the package it needs for this kind of URL, is missing.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme in ("http", "https"):
        return _WebFolder(url.rstrip("/"))
    if scheme == "file":
        path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path) if "://" in url else url
        return _LocalFolder(Path(path))
    return _StoreFolder(url)


class _WebFolder:
    def __init__(self, url: str) -> None:
        self.url = url

    @contextlib.contextmanager
    def read(self, name: str, start: int) -> Iterator[Reading]:
        url = f"{self.url}/{name}"
        with contextlib.closing(_request(url, start)) as response:
            at = _content_start(response, url)
            if at not in (0, start):
                raise ConnectionError(f"{url}: asked for byte {start}, the server began at {at}")
            yield Reading(at, _response_blocks(response, url))


def _request(url: str, start: int) -> Any:
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing lies behind `start`
            return _request(url, 0)
        if error.code in _PASSING:
            raise ConnectionError(f"{url}: {error.code} {error.reason}") from error
        if error.code in (404, 410):
            raise BadData(f"{url} is not there ({error.code} {error.reason})") from error
        raise ResourceMissing(f"{url} may not be read ({error.code} {error.reason})") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise BadData(f"{url} is no URL: {error}") from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error or type(error).__name__}") from error


def _content_start(response: Any, url: str) -> int:
    if response.status != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if match is None:
        raise ConnectionError(f"{url}: a part of the file, but the server does not say which")
    return int(match[1])


def _response_blocks(response: Any, url: str) -> Iterator[bytes]:
    left = response.length  # None: the server does not say
    try:
        while block := response.read(BLOCK):
            left = None if left is None else left - len(block)
            yield block
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url} broke off: {error}") from error
    # A connection that is cut looks like the end of the file but for this.
    if left:
        raise ConnectionError(f"{url} broke off {left} bytes before its end")


class _LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def read(self, name: str, start: int) -> Iterator[Reading]:
        path = self.path / name
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadData(f"{path} is not there") from error
        except (PermissionError, IsADirectoryError) as error:
            raise ResourceMissing(f"{path} may not be read: {error.strerror}") from error
        with file:
            file.seek(start)
            yield Reading(start, iter(lambda: file.read(BLOCK), b""))


class _StoreFolder:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.store, self.path = importlib.import_module("fsspec.core").url_to_fs(self.url)
        except ImportError as error:
            raise ResourceMissing(
                f"{url} needs fsspec and its package for that kind of URL ({error}); install them with: "
                "pip install -e '.[fetch]'"
            ) from error
        except ValueError as error:
            raise BadData(f"{url}: {error}; give http(s)://, file://, a path, or s3://") from error

    @contextlib.contextmanager
    def read(self, name: str, start: int) -> Iterator[Reading]:
        url = f"{self.url}/{name}"
        try:
            file = self.store.open(f"{self.path}/{name}", "rb")
        except FileNotFoundError as error:
            raise BadData(f"{url} is not there") from error
        except PermissionError as error:
            raise ResourceMissing(f"{url} may not be read: {error}") from error
        except Exception as error:
            # Each store's library has errors of its own, such as botocore's of missing credentials.
            raise OSError(f"{url}: {error}") from error
        with file:
            file.seek(start)
            yield Reading(start, _store_blocks(file, url))


def _store_blocks(file: Any, url: str) -> Iterator[bytes]:
    try:
        while block := file.read(BLOCK):
            yield block
    except Exception as error:  # as above
        raise OSError(f"{url} broke off: {error}") from error
