import colorsys
import sys

import numpy as np
import pytest
import torch

from narrows.data import picture, tabletop
from narrows.errors import InvalidArgument, MissingExtra

pytest.importorskip("pybullet")


def hues(image: torch.Tensor, inside: torch.Tensor) -> np.ndarray:
    """Hue in turns of the pixels inside."""
    return np.array([colorsys.rgb_to_hsv(*(pixel / 255).tolist())[0] for pixel in image.movedim(0, -1)[inside].float()])


def share_of_one_hue(image: torch.Tensor, inside: torch.Tensor) -> tuple[float, float]:
    """The commonest hue of these pixels, and the share of them that have it; light changes brightness alone."""
    found = np.exp(2j * np.pi * hues(image, inside))
    near = np.cos(np.angle(found[:, None] / found)) > np.cos(0.25)
    middle = near.sum(1).argmax()
    return float(np.angle(found[middle]) / (2 * np.pi)) % 1, float(near[middle].mean())


def test_a_mask_holds_what_has_one_colour_and_scenes_are_what_their_number_says() -> None:
    scenes = tabletop.TabletopScenes("held_out", size=64, objects=(2, 5))
    images, masks = scenes.render(range(6))
    assert images.shape == (6, 3, 64, 64)
    seen = 0
    for image, mask in zip(images, masks, strict=True):
        numbers = mask.unique().tolist()
        assert numbers[0] == 0
        assert 2 <= max(numbers) <= 5
        for number in numbers[1:]:
            if (mask == number).sum() >= 20:
                seen += 1
                assert share_of_one_hue(image, mask == number)[1] > 0.7
        assert 0.01 < (mask > 0).float().mean() < 0.5
    assert seen > 12
    assert torch.equal(tabletop.TabletopScenes("held_out", objects=(2, 5), seed=0).render([4]).images[0], images[4])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(scenes.render([2], epoch=3).images[0], images[2])
    train = tabletop.TabletopScenes(objects=(2, 5))
    assert not torch.equal(train.render([2], epoch=0).images, train.render([2], epoch=1).images)
    assert not torch.equal(train.render([2]).images[0], images[2])
    batch, labels = scenes.batch([2])
    assert torch.equal(labels[0], masks[2])
    assert torch.allclose(picture(batch)[0] * 255, images[2].float(), atol=0.51)


def test_objects_of_a_clip_move_and_keep_their_numbers() -> None:
    images, masks = tabletop.TabletopScenes("held_out", objects=(3, 3), frames=4).render([0, 1])
    assert images.shape == (2, 4, 3, 64, 64)
    kept = 0
    for clip, labels in zip(images, masks, strict=True):
        assert not torch.equal(labels[0], labels[-1])
        for number in (1, 2, 3):
            if min((labels[0] == number).sum(), (labels[-1] == number).sum()) >= 20:
                first, last = (share_of_one_hue(clip[t], labels[t] == number)[0] for t in (0, -1))
                assert min(abs(first - last), 1 - abs(first - last)) < 0.06
                kept += 1
    assert kept >= 3


def test_without_pybullet_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tabletop._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'narrows\[scenes\]'"):
        tabletop.TabletopScenes()
    tabletop._engine.cache_clear()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tabletop.TabletopScenes("val"), "split: expected"),
        (lambda: tabletop.TabletopScenes(size=8), "size: expected at least 16 pixels"),
        (lambda: tabletop.TabletopScenes(objects=(3, 2)), "objects: expected 1 <= least"),
        (lambda: tabletop.TabletopScenes(objects=(1, 10)), "objects: expected 1 <= least <= greatest <= 9"),
        (lambda: tabletop.TabletopScenes(frames=0), "frames: expected"),
    ],
)
def test_errors_say_what_is_wrong(make, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()
