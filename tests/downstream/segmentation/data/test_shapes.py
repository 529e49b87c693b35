import numpy as np
import pytest

from downstream.segmentation.data.shapes import MIN_VISIBLE, SHAPES, render_scene, shape_mask


def test_a_seed_fixes_the_scene() -> None:
    one, other = (render_scene(np.random.default_rng(3), 40, 60) for _ in range(2))
    assert one.image.shape == (40, 60, 3)
    assert one.image.dtype == np.uint8
    assert np.array_equal(one.image, other.image)
    assert one.labels == other.labels
    assert not np.array_equal(one.image, render_scene(np.random.default_rng(4), 40, 60).image)


def test_masks_do_not_overlap_and_show() -> None:
    counts = []
    for seed in range(30):
        scene = render_scene(np.random.default_rng(seed), 48, 64, num_shapes=(1, 3))
        assert scene.masks.shape == (len(scene.labels), 48, 64)
        assert scene.masks.sum(axis=0).max() <= 1
        assert scene.masks.any(axis=(1, 2)).all()
        assert set(scene.labels) <= set(range(5))
        counts.append(len(scene.labels))
    assert set(counts) == {1, 2, 3}


# Share of the circle of the given radius that a whole shape covers, by geometry.
AREAS = {
    "circle": 0.9**2,
    "square": (2 * 0.7) ** 2 / np.pi,
    "triangle": 3 * 3**0.5 / 4 / np.pi,
    "star": 5 * 0.4 * np.sin(np.pi / 5) / np.pi,
    "cross": (2 * 2 * 0.27 * 2 * 0.9 - (2 * 0.27) ** 2) / np.pi,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_areas(name: str) -> None:
    whole = []
    for seed in range(40):
        mask = shape_mask(np.random.default_rng(seed), SHAPES.index(name), 100, 100, 20)
        if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()):
            whole.append(mask.sum() / (np.pi * 20**2))
    assert len(whole) > 5
    assert np.mean(whole) == pytest.approx(AREAS[name], rel=0.02)


def test_nothing_disappears_behind_others() -> None:
    """A new shape that would cover too much of the others is left out."""
    scene = render_scene(np.random.default_rng(0), 64, 64, num_shapes=(12, 12), radius=(0.3, 0.3))
    smallest = min(AREAS.values()) * np.pi * (0.3 * 64) ** 2 / 4  # at most a quarter is left at a corner
    assert scene.masks.sum(axis=(1, 2)).min() > MIN_VISIBLE * smallest
