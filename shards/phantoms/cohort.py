"""Draw the cohort of a phantom tree: patients, follow-ups, findings and splits with the NIH statistics.

Every constant below was counted in `Data_Entry_2017_v2020.csv` (112,120 entries, 30,805
patients; NIH Clinical Center, Wang et al., CVPR 2017) and its official lists.
"""

import math

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.findings import FINDINGS, to_text

# The 110 commonest sets of findings (94 % of the entries that have one), each with its count.
# Letters a..n stand for FINDINGS in order: "cd1603" is Effusion|Infiltration, 1,603 entries.
_SETS = """
d9547 a4215 c3955 f2705 h2194 e2139 cd1603 ad1350 i1310 ac1165 m1126 b1093 k892 df829 acd737 l727
j628 bc484 id441 de420 ch403 ce402 ai398 ef394 jd392 dh345 kh337 ic337 g322 cm251 cf249 ah240 dm210
bd200 aic200 dg199 af199 jc189 ld185 eh178 ae175 ie151 fm140 jdg137 icd134 em132 fh130 if128 jcd127
kd126 bcd120 ak117 am117 n110 ag108 cdf106 al104 aid104 cde99 ach99 ck96 cdh88 ab88 jg83 aicd81 mh79
ace72 kdh72 cdm71 adh71 lm70 abc68 def67 ade67 ke66 lf66 ice65 cef65 cl59 adf57 akh54 abcd54 cg54
ij49 ih49 aj48 acm47 idf47 ckh47 im46 km46 adm45 acdh44 acf43 ide42 cdg42 acdm41 bi40 akd39 acde38
cem38 aice37 ig36 bj35 ajd35 bcm34 adg34 le34 cmh34 aie34
"""
_ENTRIES = 112_120
_TEST_SHARE = 25_596 / _ENTRIES
_MALE_SHARE = 0.565
# The share of patients with at least so many entries.
_VISITS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 60, 100, 184)
_AT_LEAST = (1, 0.4318, 0.2983, 0.187, 0.1112, 0.0826, 0.0442, 0.0285, 0.0138, 0.0031, 0.0006, 1 / 30_805)
_AGE_QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
_AGES = (1, 8, 18, 34, 49, 59, 72, 79, 95)
# AP 40 % of the entries, 77 % of the patients in one view only: a U-shaped share per patient.
_AP_BETA = (0.4, 0.6)
# The commonest detectors of each view: width and height in pixels, pixel spacing in mm, entries.
_DETECTORS: dict[str, tuple[tuple[int, int, float, int], ...]] = {
    "AP": ((2500, 2048, 0.168, 23_413), (3056, 2544, 0.139, 13_735), (2500, 2048, 0.171, 4_480)),
    "PA": ((2992, 2991, 0.143, 21_959), (2500, 2048, 0.168, 6_573), (2048, 2500, 0.168, 4_592)),
}
# Not NIH's: rare findings are raised to this share, so that a small tree can be learned from.
FLOOR = 0.06


def draw_cohort(images: int, seed: int) -> pd.DataFrame:
    """Return one row per image, sorted by file name, the same for the same arguments.

    Columns: `image` (file name), `folder`, `split` ("train_val" or "test"), `findings` (NIH's
    text), `follow_up`, `patient`, `age` (years), `sex`, `view`, `width`, `height` (pixels of the
    original), `spacing` (mm). No patient is in both splits. In each split every finding has at
    least `max(1, ceil(FLOOR * entries))` positives; the other shares follow NIH's table.
    """
    rng = np.random.default_rng([seed, 0])
    test = max(1, round(images * _TEST_SHARE))
    sides = [_draw_side(images - test, "train_val", rng), _draw_side(test, "test", rng)]
    sides[1]["patient"] += int(sides[0]["patient"].max()) + 1
    table = pd.concat(sides, ignore_index=True)
    number = rng.permutation(int(table["patient"].max()) + 1) + 1
    table["patient"] = number[table["patient"]]
    table = table.sort_values(["patient", "follow_up"], ignore_index=True)
    table.insert(0, "image", [f"{p:08d}_{f:03d}.png" for p, f in table[["patient", "follow_up"]].to_numpy()])
    folders = min(12, images)  # NIH ships 12 archives
    table.insert(1, "folder", [f"images_{row * folders // images + 1:03d}" for row in range(images)])
    return table


def _draw_side(images: int, split: str, rng: np.random.Generator) -> pd.DataFrame:
    labels = _draw_labels(images, rng)
    visits = _draw_visits(images, rng)
    patients = len(visits)
    patient = np.repeat(np.arange(patients), visits)
    follow_up = np.concatenate([np.arange(count) for count in visits])
    age = np.interp(rng.random(patients), _AGE_QUANTILES, _AGES).astype(int)
    male = rng.random(patients) < _MALE_SHARE
    view = np.where(rng.random(images) < rng.beta(*_AP_BETA, patients)[patient], "AP", "PA")
    width, height, spacing = zip(*(_draw_detector(str(v), rng) for v in view), strict=True)
    return pd.DataFrame(
        {
            "split": split,
            "findings": [to_text(row) for row in labels],
            "follow_up": follow_up,
            "patient": patient,
            # Follow-ups of ChestX-ray14 lie weeks to months apart.
            "age": np.minimum(age[patient] + follow_up // 4, 95),
            "sex": np.where(male[patient], "M", "F"),
            "view": view,
            "width": width,
            "height": height,
            "spacing": spacing,
        }
    )


def _draw_detector(view: str, rng: np.random.Generator) -> tuple[int, int, float]:
    known = _DETECTORS[view]
    count = np.array([entries for *_, entries in known], dtype=float)
    return known[int(rng.choice(len(known), p=count / count.sum()))][:3]


def _draw_visits(images: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return how many images each patient has, NIH's heavy tail, summing to `images`."""
    chance = 1 - rng.random(images)
    power = np.interp(np.log(chance), np.log(_AT_LEAST[::-1]), np.log(_VISITS[::-1]))
    # One patient must not fill a small split; NIH's largest has 184 of 112,120.
    visits = np.minimum(np.exp(power).astype(np.int64), max(2, images // 16))
    visits = visits[: int(np.searchsorted(visits.cumsum(), images)) + 1]
    visits[-1] -= visits.sum() - images
    return visits


def _draw_labels(images: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return multi-hot labels [images, 14], neighbours likely to share findings."""
    sets, share = finding_sets()
    edges = np.append(share, 1 - share.sum()).cumsum()
    sets = np.vstack([sets, np.zeros((1, len(FINDINGS)), dtype=np.uint8)])
    # Equal steps through the cumulated shares: each set comes out within one image of its share.
    chosen = np.searchsorted(edges, (np.arange(images) + rng.random()) / images).clip(max=len(sets) - 1)
    # NIH's follow-ups repeat a finding of the visit before in 13 to 56 % of cases: leave half of the
    # images in the order of the sets, strew the others among them; patients then take runs of it.
    strewn = rng.random(images) < 0.5
    place = np.where(strewn, rng.random(images), np.arange(images) / images)
    labels: npt.NDArray[np.uint8] = sets[chosen][np.argsort(place, kind="stable")]
    least = max(1, math.ceil(FLOOR * images))
    for finding in range(len(FINDINGS)):
        while labels[:, finding].sum() < min(least, images):
            burden = labels.sum(axis=1) + rng.random(images) + 99 * labels[:, finding]
            labels[int(burden.argmin()), finding] = 1
    return labels


def finding_sets() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Return sets of findings as multi-hot rows [sets, 14] and the share of images each one gets.

    The rest of the images has no finding. Shares are NIH's, raked: the sets that contain a finding
    are scaled, finding by finding, until rare findings have FLOOR and the others NIH's share.
    """
    tokens = [(token.rstrip("0123456789"), token.lstrip("abcdefghijklmn")) for token in _SETS.split()]
    sets = np.zeros((len(tokens), len(FINDINGS)), dtype=np.uint8)
    for row, (letters, _) in enumerate(tokens):
        sets[row, [ord(letter) - ord("a") for letter in letters]] = 1
    share = np.array([int(count) / _ENTRIES for _, count in tokens])
    wanted = np.maximum(FLOOR, share @ sets)
    for _ in range(25):  # settles to three digits
        for finding in range(len(FINDINGS)):
            having = sets[:, finding] == 1
            share[having] *= wanted[finding] / share[having].sum()
    first = np.lexsort(sets.T[::-1])[::-1]
    return sets[first], share[first]
