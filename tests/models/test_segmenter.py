import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrows import create_model
from narrows.errors import InvalidArgument, InvalidType
from narrows.models import PyramidNetwork
from narrows.models.segmenter import Segmenter
from tests.support import assert_close, parameter_gradients

SMALL = {"dims": (8, 16), "depths": (1, 2), "heads": (1, 2), "window_size": (4, (4, 8)), "image_size": 32}


def _small(**kwargs) -> Segmenter:
    return Segmenter("sepvit_lite", **{"num_classes": 3, "channels": 1, "dim": 8, "backbone_args": SMALL, **kwargs})


class _Blobs(nn.Module):
    """A backbone of two fixed maps, 4 and 8 pixels to a position."""

    class feature_info:  # noqa: N801
        @staticmethod
        def channels() -> list[int]:
            return [2, 2]

        @staticmethod
        def reduction() -> list[int]:
            return [4, 8]

    def forward(self, images):
        return [F.avg_pool2d(images, 4), F.avg_pool2d(images, 8)]


def test_the_pyramid_joins_maps_from_coarse_to_fine():
    pyramid = PyramidNetwork(_Blobs(), 2)
    for inner, layer in zip(pyramid.fpn.inner_blocks, pyramid.fpn.layer_blocks, strict=True):
        for convolution in (inner[0], layer[0]):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
            convolution.weight.data[range(2), range(2), convolution.kernel_size[0] // 2, -1] = 0.0
            centre = convolution.kernel_size[0] // 2
            convolution.weight.data[range(2), range(2), centre, centre] = 1.0
    images = torch.randn(3, 2, 16, 24)
    maps = pyramid(images)
    fine, coarse = F.avg_pool2d(images, 4), F.avg_pool2d(images, 8)
    assert list(maps) == ["0", "1"]
    assert_close(maps["1"], coarse)
    assert_close(maps["0"], fine + F.interpolate(coarse, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (37, 50)])
def test_every_pixel_of_any_image_gets_logits(size):
    assert _small()(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_every_parameter_learns():
    model = _small()
    for name, gradient in parameter_gradients(model, model(torch.randn(2, 1, 32, 32))).items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


def test_a_pixel_is_judged_by_what_is_around_it():
    model = _small().eval()
    images = torch.randn(1, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images)[0, :, 5, 9].sum(), images)
    assert gradient[0, 0, 5, 9].abs() > gradient.abs().mean()


def test_an_image_does_not_depend_on_its_batch():
    model = _small().eval()
    images = torch.randn(3, 1, 32, 32)
    assert_close(model(images)[1:2], model(images[1:2]))


def test_backbones_of_timm_serve_too():
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("resnet10t", features_only=True, in_chans=1, out_indices=(1, 2))
    model = Segmenter(backbone, num_classes=3, channels=1, dim=8)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3, 32, 32)


def test_what_the_backbone_does_not_decay_is_named_as_a_parameter_here():
    model = _small()
    exempt = model.no_weight_decay()
    assert exempt
    assert exempt <= {name for name, _ in model.named_parameters()}
    assert all(name.endswith("window_token") for name in exempt)


def test_a_segmenter_is_saved_and_opened(tmp_path):
    model = _small().eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 1, 32, 32)
    assert_close(Segmenter.from_pretrained(tmp_path).eval()(images), model(images), 0.0)


def test_device_and_dtype_reach_every_parameter_and_resetting_draws_each():
    model = _small(device="meta", dtype=torch.bfloat16)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.bfloat16)}
    torch.manual_seed(0)
    made = _small().state_dict()
    reset = _small(device="meta").to_empty(device="cpu")
    for value in reset.parameters():
        nn.init.constant_(value, torch.nan)
    torch.manual_seed(1)
    reset.reset_parameters()
    for name, value in reset.state_dict().items():
        deviation = made[name].std().item()
        # Six standard errors of a mean and of a standard deviation.
        error = 6 * deviation * (2 / value.numel()) ** 0.5
        assert abs(value.mean().item() - made[name].mean().item()) <= error, name
        assert abs(value.std().item() - deviation) <= error, name


def test_errors_say_what_is_expected():
    with pytest.raises(InvalidType, match="backbone: expected a module that returns feature maps"):
        Segmenter(nn.Conv2d(1, 1, 1), num_classes=2)
    with pytest.raises(InvalidType, match=r"got SepViT\. Build it with features_only=True"):
        Segmenter(create_model("sepvit_lite"), num_classes=2)
    with pytest.raises(InvalidArgument, match="features_only: expected a model with stages"):
        Segmenter("vit_mini", num_classes=2)
    with pytest.raises(InvalidArgument, match="Did you mean 'sepvit_lite'"):
        Segmenter("sepvit_lit", num_classes=2)
    with pytest.raises(InvalidArgument, match="num_classes: expected a positive integer, got 0"):
        _small(num_classes=0)


@pytest.mark.compiled
def test_one_graph_and_the_same_numbers():
    torch._dynamo.reset()
    model, images = _small().eval(), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        more = torch.randn(5, 1, 32, 32)
        assert_close(exported.module()(more), model(more))
