import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import BadData
from shards.files import sha256_of
from shards.packing.planning import SplitRecipe, choose_folders, make_plan

MakeTree = Callable[..., Path]


def test_every_entry_is_planned_once_with_its_split_and_folder(make_tree: MakeTree) -> None:
    tree = make_tree()
    plan = make_plan(tree, SplitRecipe())
    assert len(plan.table) == plan.table["image"].nunique() == 18
    assert plan.table.index.tolist() == list(range(18)) and plan.table.index.name == "row"
    assert all((tree / folder / image).is_file() for folder, image in plan.table[["folder", "image"]].values)
    assert set(plan.table.loc[plan.table["split"] == "test", "patient"]) == {3, 6, 9}
    assert plan.source_sha256 == sha256_of(tree / "Data_Entry_2017_v2020.csv")


def test_train_is_shuffled_by_the_seed_and_val_and_test_stay_in_the_metadata_s_order(make_tree: MakeTree) -> None:
    tree = make_tree(30)
    plans = {seed: make_plan(tree, SplitRecipe(seed=seed)).table for seed in (0, 1)}
    images = {
        seed: {split: rows["image"].tolist() for split, rows in table.groupby("split")} for seed, table in plans.items()
    }
    assert plans[0]["split"].drop_duplicates().tolist() == ["train", "val", "test"]
    for split in ("val", "test"):
        assert images[0][split] == sorted(images[0][split])
    assert images[0]["train"] != sorted(images[0]["train"])
    assert images[0]["train"] != images[1]["train"] and images[0]["test"] == images[1]["test"]
    assert make_plan(tree, SplitRecipe(seed=1)).table.equals(plans[1])


def test_a_val_list_takes_its_images_out_of_train_val(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree()
    (tmp_path / "val.txt").write_text("00000001_000.png\n00000001_001.png\n")
    plan = make_plan(tree, SplitRecipe(val_list=tmp_path / "val.txt"))
    assert set(plan.table.loc[plan.table["split"] == "val", "patient"]) == {1}
    assert "val_fraction" not in plan.split_recipe and "val_list_sha256" in plan.split_recipe


def test_three_lists_of_one_s_own_are_followed(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree(3)
    lists = {which: tmp_path / f"{which}.txt" for which in ("train", "val", "test")}
    for patient, path in enumerate(lists.values(), start=1):
        path.write_text(f"{patient:08d}_000.png\n{patient:08d}_001.png\n")
    recipe = SplitRecipe("file", 0, None, lists["train"], lists["val"], lists["test"])
    splits = make_plan(tree, recipe).table.groupby("split")["patient"].unique()
    assert {split: patients.tolist() for split, patients in splits.items()} == {"train": [1], "val": [2], "test": [3]}


@pytest.mark.parametrize("rule", ["official", "file"])
def test_lists_that_tear_a_patient_apart_are_refused_with_the_patient(
    make_tree: MakeTree, tmp_path: Path, rule: str
) -> None:
    tree = make_tree(3)
    (tmp_path / "val.txt").write_text("00000002_001.png")
    names = {"train": "00000001_000.png 00000001_001.png 00000002_000.png", "test": "00000003_000.png 00000003_001.png"}
    for which, text in names.items():
        (tmp_path / f"{which}.txt").write_text(text)
    val = tmp_path / "val.txt"
    recipe = {
        "official": SplitRecipe(val_list=val),
        "file": SplitRecipe("file", 0, None, tmp_path / "train.txt", val, tmp_path / "test.txt"),
    }[rule]
    with pytest.raises(BadData, match="both train and val, the first is patient 2"):
        make_plan(tree, recipe)


def test_random_needs_no_lists_and_takes_the_share_asked_for(make_tree: MakeTree) -> None:
    tree = make_tree(40)
    for path in tree.glob("*_list.txt"):
        path.unlink()
    counts = make_plan(tree, SplitRecipe("random", val_fraction=0.4)).table["split"].value_counts()
    assert [counts[split] for split in ("train", "val", "test")] == [32, 32, 16]
    with pytest.raises(BadData, match=r"train_val_list\.txt"):
        make_plan(tree, SplitRecipe())


def test_missing_images_are_counted_and_named_unless_allowed(make_tree: MakeTree) -> None:
    tree = make_tree()
    shutil.rmtree(tree / "images_002")
    with pytest.raises(
        BadData, match=r"9 of 18 images are not in .*the first are 00000005_001\.png, .*--allow-missing"
    ):
        make_plan(tree, SplitRecipe())
    plan = make_plan(tree, SplitRecipe(), allow_missing=True)
    assert len(plan.table) == 9 and plan.split_recipe["missing_images"] == 9


def test_only_the_folders_asked_for_are_packed(make_tree: MakeTree) -> None:
    plan = make_plan(make_tree(), SplitRecipe(), folders=["images_002"])
    assert set(plan.table["folder"]) == {"images_002/images"}
    assert plan.split_recipe["folders"] == ["images_002"]


def test_folders_are_chosen_by_count_or_by_number(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / "images_003").mkdir()
    assert choose_folders(tree, "2") == ["images_001", "images_002"]
    assert choose_folders(tree, "1,3") == ["images_001", "images_003"]
    for choice in ("4", "0", "1,4", "0,1"):
        with pytest.raises(BadData, match=f"has 3 image folders; --folders {choice} asks"):
            choose_folders(tree, choice)


def test_a_tree_without_its_images_or_without_train_is_refused(make_tree: MakeTree) -> None:
    tree = make_tree(3)
    (tree / "test_list.txt").write_text("\n".join(path.name for path in tree.rglob("*.png")))
    (tree / "train_val_list.txt").write_text("another.png")
    with pytest.raises(BadData, match="leaves no patient for train"):
        make_plan(tree, SplitRecipe())
    for path in tree.rglob("*.png"):
        path.unlink()
    with pytest.raises(BadData, match=re.escape(f"no image of {tree}")):
        make_plan(tree, SplitRecipe(), allow_missing=True)


def test_the_real_sample_keeps_nih_s_test_images_for_test(nih_data: Path) -> None:
    plan = make_plan(nih_data / "nih_sample", SplitRecipe())
    assert (len(plan.table), (plan.table["split"] == "test").sum()) == (120, 44)
