import numpy as np
import pytest
import torch

from loaders.augment import PARAMETERS, RANGES, distort, draw
from loaders.spec import Augment


def parameters(**changes: float) -> np.ndarray:
    names = ("angle", "right", "down", "scale", "brightness", "contrast")
    return np.array([[changes.get(name, 0.0) for name in names]], dtype=np.float32)


def spot(row: int, column: int, side: int = 65) -> torch.Tensor:
    """A bright square of 5 x 5 around one pixel of a gray image."""
    image = torch.full((1, side, side), 60, dtype=torch.uint8)
    image[0, row - 2 : row + 3, column - 2 : column + 3] = 240
    return image


def brightest(image: torch.Tensor) -> tuple[float, float]:
    rows, columns = torch.nonzero(image[0] > 150, as_tuple=True)
    return float(rows.double().mean()), float(columns.double().mean())


def test_nothing_drawn_changes_nothing() -> None:
    image = torch.randint(0, 256, (3, 33, 33), dtype=torch.uint8)
    assert torch.equal(distort(image, np.zeros((3, PARAMETERS), dtype=np.float32)), image)


@pytest.mark.parametrize(("change", "place"), [({"right": 0.2}, (32, 32 + 13)), ({"down": -0.2}, (32 - 13, 32))])
def test_a_shift_moves_by_a_share_of_the_side(change: dict[str, float], place: tuple[int, int]) -> None:
    assert brightest(distort(spot(32, 32), parameters(**change))) == pytest.approx(place, abs=0.2)


def test_a_positive_angle_turns_the_right_side_down_and_scale_moves_away_from_the_centre() -> None:
    turned = brightest(distort(spot(32, 52), parameters(angle=np.pi / 2)))
    assert turned == pytest.approx((52, 32), abs=0.2)
    assert brightest(distort(spot(32, 42), parameters(scale=1.0))) == pytest.approx((32, 52), abs=0.6)


def test_gray_levels_follow_the_formula_and_are_cut_off() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    found = distort(image, parameters(brightness=0.1, contrast=0.2))
    levels = np.arange(256, dtype=np.float64)
    expected = np.clip(np.rint((levels - 127.5) * 1.2 + 127.5 + 25.5), 0, 255)
    assert np.abs(found.numpy().ravel() - expected).max() <= 1
    assert found.max() == 255


@pytest.mark.parametrize("augment", RANGES)
def test_what_is_drawn_fills_its_range_and_not_more(augment: Augment) -> None:
    drawn = np.abs(draw(4000, augment, np.random.default_rng(0)))
    bounds = RANGES[augment].bounds()
    assert drawn.dtype == np.float32 and (drawn <= bounds).all()
    assert (drawn.max(axis=0) > 0.99 * bounds).all()
    assert np.allclose(drawn.mean(axis=0), bounds / 2, rtol=0.05)


def test_an_image_is_distorted_alike_in_any_batch() -> None:
    images = torch.randint(0, 256, (9, 40, 40), dtype=torch.uint8)
    drawn = draw(9, "strong", np.random.default_rng(1))
    together = distort(images, drawn)
    alone = torch.cat([distort(images[n : n + 1], drawn[n : n + 1]) for n in range(9)])
    assert torch.equal(together, alone)
