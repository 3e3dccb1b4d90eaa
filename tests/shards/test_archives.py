"""What is not a folder of images, said with the next step: archives, shards of other makers, lost lists."""

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import BadData
from shards.manifest import read_manifest
from shards.packing.planning import SplitRecipe, choose_folders, make_plan

MakeTree = Callable[..., Path]
NOT_READ = "shards of another maker are not read (their labels may be pickles); start from the images"


def tar_of(path: Path, names: list[str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return path


def zip_of(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(100):
            archive.writestr(f"images_001/images/{n:08d}_000.png", b"")
    return path


FOREIGN = [f"{n:05d}.{suffix}" for n in range(3) for suffix in ("jpg", "cls", "json")]
IMAGES = [f"images/{n:08d}_000.png" for n in range(100)]


def refusal(source: Path) -> str:
    with pytest.raises(BadData) as error:
        make_plan(source, SplitRecipe())
    assert "\n" not in error.value.message and len(error.value.message) < 500
    return error.value.message


@pytest.mark.parametrize("name", ["00000.tar", "data.csv"])
def test_a_shard_of_another_maker_is_not_read_and_the_images_are_asked_for(tmp_path: Path, name: str) -> None:
    said = refusal(tar_of(tmp_path / name, FOREIGN))
    assert said.startswith(f"{tmp_path / name} is a WebDataset tar: {NOT_READ}")


def test_a_folder_of_such_shards_is_not_read_either(tmp_path: Path) -> None:
    for n in range(2):
        tar_of(tmp_path / f"{n:05d}.tar", FOREIGN)
    assert refusal(tmp_path).startswith(f"{tmp_path} holds WebDataset tars such as 00000.tar: {NOT_READ}")
    with pytest.raises(BadData) as error:
        read_manifest(tmp_path)
    assert NOT_READ in error.value.message and f"SOURCE {tmp_path}" not in error.value.message


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("download.tar", lambda path: tar_of(path, IMAGES)),
        ("images_001.tar.gz", lambda path: tar_of(path, IMAGES, "w:gz")),
        ("images_001.tgz", lambda path: tar_of(path, IMAGES, "w:gz")),
        ("archive.zip", zip_of),
        ("no suffix", zip_of),
    ],
)
def test_an_archive_is_to_be_unpacked_with_a_command_that_works(
    tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    archive = make(tmp_path / name)
    said = refusal(archive)
    assert said.startswith(f"{archive} is an archive; unpack it, and give a folder that holds Data_Entry_2017")
    command = said.rsplit(": ", 1)[1]
    if command.startswith("mkdir"):
        subprocess.run(command, shell=True, check=True)
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert len(list(folder.rglob("*.png"))) == 100


def test_archives_that_are_not_unpacked_are_named_where_images_are_missing(make_tree: MakeTree) -> None:
    tree = make_tree()
    for folder in ("images_001", "images_002"):
        subprocess.run(f"cd {tree / folder} && tar -czf ../{folder}.tar.gz images", shell=True, check=True)
    make_plan(tree, SplitRecipe())  # beside their folders they are nobody's business
    subprocess.run(["rm", "-r", tree / "images_002"], check=True)
    said = refusal(tree)
    assert "images are not in" in said and "1 archives are not unpacked, the first is: mkdir -p" in said
    subprocess.run(["rm", "-r", tree / "images_001"], check=True)
    said = refusal(tree)
    assert "18 of 18 images are not in" in said and "2 archives are not unpacked" in said
    with pytest.raises(BadData, match=r"has 0 image folders.*2 archives are not unpacked"):
        choose_folders(tree, "1")
    while "archives are not unpacked, the first is: " in (said := refusal_or_none(tree)):
        command = said.split("the first is: ")[1].split(", or pack what is there")[0]
        subprocess.run(command, shell=True, check=True)
    assert said == "" and len(make_plan(tree, SplitRecipe()).table) == 18


def refusal_or_none(source: Path) -> str:
    try:
        make_plan(source, SplitRecipe())
    except BadData as error:
        return error.message
    return ""


def test_the_metadata_file_alone_is_not_enough(make_tree: MakeTree) -> None:
    csv = make_tree() / "Data_Entry_2017_v2020.csv"
    assert refusal(csv) == f"{csv} is a file; give the folder that it and the images are in"


def test_a_foreign_table_of_many_columns_is_named_in_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017.csv").write_text(",".join(f"column {n}" for n in range(5000)) + "\n1\n")
    assert refusal(tmp_path).endswith("column 11, and 4988 more")


def test_shards_that_are_packed_already_are_to_be_trained_on(packed: Path) -> None:
    assert refusal(packed).endswith(f"holds shards that are packed already: python -m trainer --shards {packed}")


def test_a_missing_list_offers_a_random_split(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / "test_list.txt").unlink()
    said = refusal(tree)
    assert said.startswith(f"cannot read the list {tree / 'test_list.txt'}: ") and "--split random" in said
    make_plan(tree, SplitRecipe("random"))


def test_shards_that_were_moved_are_asked_for_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"there is no such folder\); if they were moved, .*--shards FOLDER"):
        read_manifest(tmp_path / "gone")


def test_a_pack_or_a_fetch_that_is_not_finished_is_to_be_run_again(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(BadData, match=r"tars but no manifest\.json, .* run again, finishes it"):
        read_manifest(shards)


def test_a_tar_instead_of_the_folder_of_shards_is_said_to_be_a_file(packed: Path) -> None:
    with pytest.raises(BadData, match="is a file; give the folder of shards"):
        read_manifest(packed / "train-00000.tar")
