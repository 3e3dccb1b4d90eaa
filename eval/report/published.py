"""Published results on ChestX-ray14 with their sources, and when ours are comparable."""

from dataclasses import dataclass

import pandas as pd

from eval.evaluation import Evaluation
from eval.report.html import Cell, Column, Table, frame_table, number_of, text_of
from shards.folder import ShardFolder


@dataclass(frozen=True)
class Published:
    """One published result."""

    model: str
    macro_auroc: float
    source: str
    macro_f1: float | None = None
    micro_f1: float | None = None


XIAO = "Xiao et al., Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification, WACV 2023"
GUAN = (
    "Guan and Huang, Multi-label chest X-ray image classification via category-wise residual attention "
    "learning, Pattern Recognition Letters, 2018"
)
WANG = "Wang et al., ChestX-ray8, CVPR 2017"

OFFICIAL = (
    Published("ViT-B/16, pre-trained on X-rays (medical_mae)", 0.830, XIAO),
    Published("DenseNet-121", 0.822, XIAO),
    Published("CRAL, ResNet-50", 0.814, GUAN),
    Published("ResNet-50, plain", 0.803, GUAN),
    Published("ResNet-50", 0.745, WANG),
)
"""Mean AUROC of the 14 findings on NIH's official test list, best first."""

BASELINE_PAPER = "the baseline paper"
OWN_SPLIT = (
    Published("ResNet-50", 0.795, BASELINE_PAPER, macro_f1=0.26, micro_f1=0.32),
    Published("custom CNN", 0.663, BASELINE_PAPER, macro_f1=0.15, micro_f1=0.22),
    Published("ViT-B/16, frozen", 0.580, BASELINE_PAPER, macro_f1=0.11, micro_f1=0.15),
)
"""On a random split of its own: other images, so these are near our numbers, not comparable to them."""

# NIH's test_list.txt holds 25,596 images of 2,797 patients.
OFFICIAL_IMAGES = 25_596
OFFICIAL_PATIENTS = 2_797


def why_not_comparable(shards: ShardFolder, split: str, images: int, *, on_training_shards: bool) -> str | None:
    """Return None where `images` of `split` are NIH's whole official test split, else what they are.

    Phantoms are split by an official rule, too, so the numbers of images and patients must be NIH's as
    well. `on_training_shards`: whether every run was trained on the shards it is scored on; else it may
    have been trained on these very patients.
    """
    if not on_training_shards:
        return "the model was trained on other shards, whose train split may hold the patients scored here"
    rule = shards.manifest.recipe["split"]
    if rule != "official":
        return f"the shards are split by the rule {rule}, not by NIH's official lists"
    if split != "test":
        return f"{split} was scored, not the official test split"
    packed = shards.manifest.splits["test"]
    if (packed.images, packed.patients) != (OFFICIAL_IMAGES, OFFICIAL_PATIENTS):
        return (
            f"the test split holds {packed.images:,} images of {packed.patients:,} patients, "
            f"NIH's {OFFICIAL_IMAGES:,} of {OFFICIAL_PATIENTS:,}"
        )
    if images != OFFICIAL_IMAGES:
        return f"{images:,} of the {OFFICIAL_IMAGES:,} images were scored"
    return None


def published_table(evaluation: Evaluation) -> Table:
    """Return the evaluation among published results on the official split and the baseline paper's, best first."""
    columns = (
        Column("Model", is_number=False, cell=text_of("model")),
        Column("Mean AUROC", cell=number_of("macro_auroc")),
        Column("Macro F1", cell=number_of("macro_f1", 2)),
        Column("Micro F1", cell=number_of("micro_f1", 2)),
        Column("Test images", is_number=False, cell=lambda row: Cell(row["split"], row["split"].split()[0])),
        Column("Source", is_number=False, cell=text_of("source")),
    )
    macro, micro = evaluation.scores.macro, evaluation.scores.micro
    ours = Published(evaluation.name, macro["auroc"], "this report", macro["f1"], micro["f1"])
    rows = [{**vars(each), "split": "official split"} for each in (ours, *OFFICIAL)]
    rows += [{**vars(each), "split": "own random split"} for each in OWN_SPLIT]
    if evaluation.intervals is not None:
        rows[0] |= {f"macro_{end}": evaluation.intervals.at["macro", end] for end in ("auroc_low", "auroc_high")}
    frame = pd.DataFrame(rows).sort_values("macro_auroc", ascending=False, kind="stable")
    return frame_table("published-table", "Published results", columns, frame)
