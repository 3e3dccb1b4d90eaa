"""Recognize an archive or a foreign shard given where a folder of images belongs, and name the next step."""

import lzma
import shlex
import tarfile
import zipfile
import zlib
from pathlib import Path

NOT_READ = "shards of another maker are not read (their labels may be pickles); start from the images"
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError)


def is_archive(path: Path) -> bool:
    """Tell whether a file is a zip or a tar, compressed or not, whatever it is called."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except _UNREADABLE:
        return False


def is_webdataset(path: Path) -> bool:
    """Tell whether a file is a tar whose first two members are of one sample, as `0.jpg` and `0.cls`."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [Path(member.name) for member in (archive.next(), archive.next()) if member is not None]
    except _UNREADABLE:
        return False
    keys = [name.parent / name.name.partition(".")[0] for name in names]
    return len(set(names)) == 2 and len(set(keys)) == 1 and all("." in name.name for name in names)


def unpack_command(archive: Path) -> str:
    """Return the shell command that unpacks an archive into the folder of its name beside it."""
    source, folder = shlex.quote(str(archive)), shlex.quote(str(_folder(archive)))
    if zipfile.is_zipfile(archive):
        return f"unzip {source} -d {folder}"
    return f"mkdir -p {folder} && tar -xf {source} -C {folder}"


def packed_archives(folder: Path) -> list[Path]:
    """Return the archives in a folder that have no folder of their name beside them, in order."""
    files = [path for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and path.is_file()]
    return sorted(path for path in files if not _folder(path).is_dir())


def _folder(archive: Path) -> Path:
    suffix = next((end for end in sorted(_SUFFIXES, key=len)[::-1] if archive.name.endswith(end)), None)
    return archive.with_name(archive.name.removesuffix(suffix) if suffix else f"{archive.name}-unpacked")
