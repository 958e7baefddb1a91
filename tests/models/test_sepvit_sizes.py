"""Images of any size, and of several sizes in one batch."""

import pytest
import torch
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.models import SepViT, create_model
from narrows.ops.separable_attention import WindowOrder
from tests.models.small_sepvit import images, random_small, small
from tests.support import assert_close, gradients

SIZES = [(16, 16), (23, 31), (7, 40), (32, 13), (3, 3)]


def in_one_batch(several: list[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
    """The images in the upper left corners of one canvas, which holds what no image should meet, and the mask."""
    canvas = torch.full((len(several), 3, height, width), torch.nan, dtype=several[0].dtype)
    mask = torch.zeros(len(several), height, width, dtype=torch.bool)
    for index, image in enumerate(several):
        canvas[index, :, : image.shape[2], : image.shape[3]] = image
        mask[index, : image.shape[2], : image.shape[3]] = True
    return canvas, mask


@pytest.mark.parametrize("canvas", [(32, 40), (48, 41), (64, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"global_pool": "max"}, {"image_size": None}, {"image_size": 4}], ids=str)
def test_an_image_in_a_padded_batch_gets_what_it_gets_alone(
    options: dict[str, object], canvas: tuple[int, int]
) -> None:
    model = random_small(**options)
    several = [images(*size, batch=1).double() for size in SIZES]
    logits = model(*in_one_batch(several, *canvas))
    for index, image in enumerate(several):
        assert_close(logits[index : index + 1], model(image), 1e-12)


def test_its_feature_maps_and_gradients_are_its_own_too() -> None:
    model = random_small()
    several = [images(*size, batch=1).double() for size in SIZES]
    batch, mask = in_one_batch(several, 40, 44)
    for feature_map, reduction in zip(
        model.forward_intermediates(batch, mask=mask, intermediates_only=True), (2, 4), strict=True
    ):
        real = mask[:, ::reduction, ::reduction]
        assert (feature_map.movedim(1, -1)[~real] == 0).all()
    for index, image in enumerate(several):
        together, alone = batch.clone().requires_grad_(), image.clone().requires_grad_()
        maps = model.forward_intermediates(together, mask=mask, intermediates_only=True)
        own = model.forward_intermediates(alone, intermediates_only=True)
        for padded, expected in zip(maps, own, strict=True):
            height, width = expected.shape[2:]
            assert_close(padded[index : index + 1, :, :height, :width], expected, 1e-12)
        (found,) = gradients(model(together, mask)[index], together)
        (expected,) = gradients(model(alone)[0], alone)
        height, width = image.shape[2:]
        assert_close(found[index : index + 1, :, :height, :width], expected, 1e-12)
        found[index, :, :height, :width] = 0
        assert (found == 0).all(), "neither padding nor other images"


def test_float32_gives_each_image_its_own_to_five_digits() -> None:
    model = create_model("sepvit_lite", depths=(1, 2, 2, 1), num_classes=10).eval()
    several = [images(*size, batch=1) for size in [(64, 96), (100, 75), (128, 128)]]
    with torch.no_grad():
        logits = model(*in_one_batch(several, 160, 128))
        for index, image in enumerate(several):
            assert_close(logits[index : index + 1], model(image), 1e-5)


def test_a_full_mask_is_no_mask_and_an_empty_one_is_finite() -> None:
    model, x = random_small(), images(20, 24).double()
    mask = torch.ones(2, 20, 24, dtype=torch.bool)
    assert_close(model(x, mask), model(x), 1e-12)
    mask[1] = False
    x.requires_grad_()
    logits = model(x, mask)
    assert_close(logits[:1], model(x)[:1], 1e-12)
    assert_close(logits[1], model.head.bias, 1e-12)
    (gradient,) = gradients(logits, x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (33, 47), (3, 90), (25, 3)], ids=str)
@pytest.mark.parametrize("window_tokens", ["shared", "per_window"])
def test_any_size_runs_with_the_same_weights(window_tokens: str, size: tuple[int, int]) -> None:
    model = random_small(window_tokens=window_tokens)
    height, width = size
    assert model(images(*size).double()).isfinite().all()
    grids = [feature_map.shape[2:] for feature_map in
             model.forward_intermediates(images(*size).double(), intermediates_only=True)]  # fmt: skip
    assert grids == [(-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]


def test_padding_that_is_not_needed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows as copies with masks, as where they do not divide the map, against windows as views without."""
    model, x = random_small(), images(32, 48).double()
    expected = model(x)
    monkeypatch.setattr(WindowOrder, "nested", False)
    assert_close(model(x), expected, 1e-12)


def test_without_attention_between_windows_one_window_reads_nothing_of_another() -> None:
    """Built for a size with a single window, a stage keeps to its windows on larger images: nothing untrained works."""
    model = SepViT(image_size=8, num_classes=2, dims=(8,), depths=(2,), heads=(2,), window_size=4, patch_stride=2)
    x = images(8, 32, batch=1).requires_grad_()
    names = {name for name, _ in model.named_parameters()}
    assert not any("window" in name for name in names)
    stage = model.stages[0]
    stage.position.weight.data.zero_()
    stage.embedding.weight.data[:, :, :1] = stage.embedding.weight.data[:, :, :, :1] = 0
    (gradient,) = gradients(model.forward_features(x)[0, :, :4], x)
    assert gradient[..., :8].abs().max() > 0
    assert (gradient[..., 9:] == 0).all()


def test_masks_and_tokens_that_belong_to_places_do_not_go_together() -> None:
    model = small(window_tokens="per_window")
    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match=r'mask: expected none where window_tokens is "per_window"'):
        model(images(32, 32), mask)


def test_shared_tokens_and_the_same_token_for_each_window_are_one_network() -> None:
    shared, each = random_small(), random_small(window_tokens="per_window")
    state = shared.state_dict()
    for name, value in each.state_dict().items():
        state[name] = state[name].expand(value.shape)
    each.load_state_dict(state)
    for size in [(32, 32), (30, 50)]:
        assert_close(each(images(*size).double()), shared(images(*size).double()), 1e-12)
