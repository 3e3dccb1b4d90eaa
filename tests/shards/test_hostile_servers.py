"""Fetching from a server on this machine that means harm: no byte too many, no waiting without end."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from shards.errors import BadData, ResourceMissing
from shards.fetching import Fetched, fetch_shards
from shards.manifest import read_manifest
from tests.serving import FLOOD, Server, floods, redirects, waits

TAR = "train-00001.tar"
OK = "HTTP/1.1 200 OK\n"
CHUNKED = OK + "Transfer-Encoding: chunked\n\n"


def fetch(url: str, dest: Path, retries: int = 2, jobs: int = 2, **options: Any) -> Fetched:
    return fetch_shards(url, dest, jobs=jobs, retries=retries, backoff=0, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "start",
    [
        CHUNKED + "-5\n",
        CHUNKED + "-FFFFFFFFFFFF\n",
        CHUNKED + "F" * 400 + "\n",
        CHUNKED + "FFFFFFFFFFFFFFF\n",
        OK + "Content-Length: -1\n\n",
        OK + "Content-Length: 999999999999999999\n\n",
        OK + "\n",
        OK + "X: ",
        "",
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", TAR])
def test_a_body_of_negative_or_absurd_size_is_not_read(server: Server, dest: Path, name: str, start: str) -> None:
    server.answers = {name: floods(start)}
    with pytest.raises((BadData, ResourceMissing), match=name):
        fetch(server.url, dest, retries=0, jobs=1)
    assert server.sent < FLOOD / 2
    assert not dest.exists() or not {name, "manifest.json"} & {path.name for path in dest.iterdir()}


@pytest.mark.parametrize("name", ["manifest.json", "entries.csv", "rejects.csv", "boxes.csv", "train-00001.idx", TAR])
def test_no_file_may_be_longer_than_the_manifest_lets_expect(
    server: Server, packed: Path, dest: Path, name: str
) -> None:
    with_boxes = dataclasses.replace(read_manifest(packed), boxes_sha256=hashlib.sha256(b"boxes").hexdigest())
    server.replaced = {"manifest.json": with_boxes.to_json().encode(), "boxes.csv": b"boxes"}
    server.answers = {name: floods(CHUNKED + "FFFFFFFFFFFFFFF\n")}
    with pytest.raises(BadData, match=rf"{server.url}/{name} has more than the [\d,]+ bytes that it may have"):
        fetch(server.url, dest, jobs=1)
    assert server.sent < FLOOD / 2


def test_shards_for_which_the_disk_has_no_room_are_not_begun(server: Server, packed: Path, dest: Path) -> None:
    manifest = read_manifest(packed)
    shards = tuple(dataclasses.replace(shard, bytes=10**15) for shard in manifest.shards)
    server.replaced = {"manifest.json": dataclasses.replace(manifest, shards=shards).to_json().encode()}
    with pytest.raises(ResourceMissing, match=r"has room for .* bytes, the missing shards have"):
        fetch(server.url, dest)
    assert server.asked == ["manifest.json"]


@pytest.mark.parametrize("status", [416, 206, 204, 304, 300, 401, 501])
@pytest.mark.parametrize("name", ["manifest.json", TAR])
def test_an_answer_that_is_not_the_file_ends_in_exit_4(server: Server, dest: Path, name: str, status: int) -> None:
    server.answers = {name: lambda handler: handler.raw(f"HTTP/1.1 {status} So\nContent-Length: 0\n\n")}
    with pytest.raises(ResourceMissing, match=rf"{server.url}/{name} may not be read \({status} So\)"):
        fetch(server.url, dest)
    assert server.asked.count(name) == 1


@pytest.mark.parametrize(
    ("name", "start"),
    [("manifest.json", ""), (TAR, OK), (TAR, OK + "Content-Length: 14336\n\n"), (TAR, CHUNKED + "5\nabc")],
)
def test_a_silent_server_is_given_up(server: Server, dest: Path, name: str, start: str) -> None:
    server.answers = {name: waits(start)}
    with pytest.raises(ResourceMissing, match=rf"cannot fetch {name} .*no byte in 1 s; .*same command"):
        fetch(server.url, dest, retries=0, idle_timeout=1, min_rate=1)


@pytest.mark.parametrize(
    ("start", "every"), [("", "HTTP/1.1 100 Continue\n\n"), (OK + "X: ", "y"), (CHUNKED, "1\n\0\n")]
)
def test_a_trickling_server_is_given_up(server: Server, dest: Path, start: str, every: str) -> None:
    server.answers = {TAR: waits(start, every)}
    with pytest.raises(ResourceMissing, match=rf"cannot fetch {TAR} .*longer than 3 s, slower than"):
        fetch(server.url, dest, retries=0, idle_timeout=1.5, min_rate=10**9)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "ws://127.0.0.1/x", "s3://a/b"])
def test_a_redirect_to_anything_but_http_is_refused(server: Server, dest: Path, target: str) -> None:
    server.answers = {"manifest.json": redirects(target)}
    scheme = target.partition("/")[0]
    with pytest.raises(ResourceMissing, match=rf"{server.url}/manifest.json redirects to {scheme}//"):
        fetch(server.url, dest)
    assert server.asked == ["manifest.json"]


def test_what_a_server_says_of_itself_is_cut_to_a_line(server: Server, dest: Path) -> None:
    server.answers = {"manifest.json": lambda handler: handler.raw(f"HTTP/1.1 403 {'No ' * 20000}\n\n")}
    with pytest.raises(ResourceMissing, match="may not be read") as error:
        fetch(server.url, dest)
    assert len(error.value.message) < 500


def test_a_redirect_is_followed_a_few_times(server: Server, packed: Path, dest: Path) -> None:
    server.answers = {TAR: redirects("/there"), "there": redirects(f"{server.url}/x/{TAR}.moved")}
    server.replaced = {f"{TAR}.moved": (packed / TAR).read_bytes()}
    fetch(server.url, dest)
    assert contents(dest) == contents(packed)
    server.answers = {TAR: redirects(TAR)}
    server.asked.clear()
    (dest / TAR).unlink()
    with pytest.raises(ResourceMissing, match=rf"{server.url}/{TAR} redirects more than 5 times"):
        fetch(server.url, dest)
    assert server.asked.count(TAR) == 6


def test_the_body_of_a_redirect_is_not_read(server: Server, packed: Path, dest: Path) -> None:
    server.answers = {TAR: floods("HTTP/1.1 302 Found\nLocation: /there\n\n")}
    server.replaced = {"there": (packed / TAR).read_bytes()}
    fetch(server.url, dest)
    assert contents(dest) == contents(packed) and server.sent < FLOOD / 2
