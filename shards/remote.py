"""Stream files from a remote folder: a web server, another folder, or an object store."""

import asyncio
import contextlib
import functools
import importlib
import ssl
import textwrap
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from shards.errors import BadData, ResourceMissing

BLOCK = 1 << 20  # bytes
# What a server says of itself for the moment, not of the file: worth another try.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_MAX_REDIRECTS = 5

RemoteFolder = Callable[[str], AsyncGenerator[bytes, None]]
"""A folder somewhere: yields the blocks of the file with a name, to its end.

Raises ConnectionError for what may pass when tried again, BadData where there is no such file,
ResourceMissing where it may not be read.
"""


@contextlib.asynccontextmanager
async def open_remote(url: str, idle_timeout: float) -> AsyncIterator[RemoteFolder]:
    """Open the folder at `url`: http(s)://, file://, a path, or whatever fsspec knows (s3://, hf://, gs://).

    A server that sends no byte for `idle_timeout` seconds is given up, with ConnectionError. Raises
    BadData where `url` is none; ResourceMissing where fsspec, or the package it needs for this kind of URL,
    is missing, or the store cannot be opened.
    """
    scheme = url.partition("://")[0].lower() if "://" in url else "file"
    if scheme in ("http", "https"):
        async with _web_client(idle_timeout) as client:
            yield functools.partial(_read_web, client, url.rstrip("/"))
    elif scheme == "file":
        try:
            path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path) if "://" in url else url)
        except ValueError as error:
            raise BadData(f"{url} is no URL: {_line(error)}") from error
        yield functools.partial(_read_file, lambda name: (path / name).open("rb", buffering=0), path, idle_timeout)
    else:
        url = url.rstrip("/")
        yield functools.partial(_read_file, await _open_store(url, idle_timeout), url, idle_timeout)


def _web_client(idle_timeout: float) -> httpx.AsyncClient:
    try:
        return httpx.AsyncClient(
            timeout=idle_timeout,
            limits=httpx.Limits(max_connections=None),
            headers={"Accept-Encoding": "identity"},
            # The system's certificates, among which a clinic's proxy may have its own.
            verify=ssl.create_default_context(),
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ResourceMissing(
            f"cannot use the web: {_line(error)}; look at the environment's proxy and SSL_CERT variables"
        ) from error


async def _read_web(client: httpx.AsyncClient, folder: str, name: str) -> AsyncGenerator[bytes, None]:
    url = f"{folder}/{name}"
    try:
        async with contextlib.aclosing(await _request(client, url)) as response:
            _check_status(response)
            async for block in response.aiter_raw():
                yield block
    except (BadData, ResourceMissing):
        raise
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise BadData(f"{url} is no URL: {_line(error)}") from error
    except httpx.TimeoutException as error:
        raise ConnectionError(f"{url}: no byte in {client.timeout.read:g} s") from error
    except Exception as error:
        # Not httpx.TransportError alone: a port of twenty digits, in a redirect too, is an ExceptionGroup.
        raise ConnectionError(f"{url}: {_line(error)}") from error


async def _request(client: httpx.AsyncClient, url: str) -> httpx.Response:
    # Not by httpx, which reads the body of a redirect, however long that is.
    request = client.build_request("GET", url)
    for _ in range(_MAX_REDIRECTS + 1):
        response = await client.send(request, stream=True)
        if response.next_request is None:
            return response
        await response.aclose()
        request = response.next_request
        if request.url.scheme not in ("http", "https"):
            raise ResourceMissing(f"{url} redirects to {_line(request.url)}, which is not followed: no http(s)://")
    raise ResourceMissing(f"{url} redirects more than {_MAX_REDIRECTS} times, at last to {_line(request.url)}")


def _check_status(response: httpx.Response) -> None:
    url, answer = _line(response.url), _line(f"{response.status_code} {response.reason_phrase}")
    if response.status_code in _PASSING:
        raise ConnectionError(f"{url}: {answer}")
    if response.status_code in (404, 410):
        raise BadData(f"{url} is not there ({answer})")
    if response.status_code != 200:
        raise ResourceMissing(f"{url} may not be read ({answer})")


async def _open_store(url: str, idle_timeout: float) -> Callable[[str], Any]:
    try:
        url_to_fs = importlib.import_module("fsspec.core").url_to_fs
        store, path = await asyncio.wait_for(asyncio.to_thread(url_to_fs, url), idle_timeout)
    except ImportError as error:
        raise ResourceMissing(
            f"{url} needs fsspec and its package for that kind of URL ({_line(error)}); install them with: "
            "pip install -e '.[fetch]'"
        ) from error
    except ValueError as error:
        raise BadData(f"{url}: {_line(error)}; give http(s)://, file://, a path, or s3://") from error
    except Exception as error:
        raise ResourceMissing(f"{url} cannot be opened: {_line(error)}") from error
    return lambda name: store.open(f"{path}/{name}", "rb")


async def _read_file(
    open_file: Callable[[str], Any], folder: Path | str, idle_timeout: float, name: str
) -> AsyncGenerator[bytes, None]:
    url = f"{folder}/{name}"
    file = await _call(open_file, name, url, idle_timeout)
    with contextlib.closing(file):
        while block := await _call(file.read, BLOCK, url, idle_timeout):
            yield block


async def _call(function: Callable[[Any], Any], argument: object, url: str, idle_timeout: float) -> Any:
    # In a thread, which a dead disk or store cannot hold the others up in.
    try:
        return await asyncio.wait_for(asyncio.to_thread(function, argument), idle_timeout)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadData(f"{url} is not there") from error
    except (PermissionError, IsADirectoryError) as error:
        raise ResourceMissing(f"{url} may not be read: {error.strerror or _line(error)}") from error
    except asyncio.TimeoutError as error:
        raise ConnectionError(f"{url}: no byte in {idle_timeout:g} s") from error
    except Exception as error:
        # Each store's library has errors of its own, such as botocore's of missing credentials.
        raise ConnectionError(f"{url}: {_line(error)}") from error


def _line(said: object) -> str:
    if isinstance(said, httpx.ConnectError):  # which says no more than that all attempts failed
        while cause := said.__cause__ or said.__context__:
            said = cause
    return textwrap.shorten(str(said), 300, placeholder="...") or type(said).__name__
