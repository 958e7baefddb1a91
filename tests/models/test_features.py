import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.models import FeaturePyramid, create_model
from tests.models.small_sepvit import images, random_small, small
from tests.support import assert_close

LITE = {"dims": (8, 16, 16, 32), "heads": 2, "depths": (1, 1, 2, 1)}


@pytest.mark.parametrize("indices", [None, (0, 1, 2, 3), (1, 3), (3, 0), (-1,), 2], ids=str)
def test_feature_maps_are_those_of_the_stages(indices: tuple[int, ...] | int | None) -> None:
    torch.manual_seed(0)
    model = create_model("sepvit_lite", **LITE)
    torch.manual_seed(0)
    pyramid = create_model("sepvit_lite", features_only=True, out_indices=indices, **LITE)
    assert isinstance(pyramid, FeaturePyramid)
    expected = model.eval().forward_intermediates(images(70, 96), intermediates_only=True)
    wanted = {None: [0, 1, 2, 3], 2: [2, 3], (-1,): [3]}.get(indices, indices)
    maps = pyramid.eval()(images(70, 96))
    assert len(maps) == len(wanted) == len(pyramid.feature_info)
    for feature_map, index, channels, reduction in zip(
        maps, wanted, pyramid.feature_info.channels(), pyramid.feature_info.reduction(), strict=True
    ):
        assert torch.equal(feature_map, expected[index])
        assert feature_map.shape == (2, channels, -(-70 // reduction), -(-96 // reduction))
        assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert pyramid.feature_info.module_name() == [f"stages.{index}" for index in wanted]


def test_stages_that_no_map_needs_are_gone() -> None:
    pyramid = create_model("sepvit_lite", features_only=True, out_indices=(0, 2), **LITE)
    assert len(pyramid.model.stages) == 3
    assert not any(name.startswith(("model.head", "model.norm")) for name, _ in pyramid.named_parameters())
    pyramid(images(64, 64)).pop().sum().backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_intermediates_and_the_final_map_are_those_of_forward() -> None:
    model, x = random_small(), images(32, 40).double()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert_close(model.norm(maps[-1].movedim(1, -1)), final, 1e-12)
    assert torch.equal(model.forward_head(final), model(x))

    final, (last,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC")
    assert torch.equal(last, final)
    early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(early.movedim(-1, 1), first)
    assert torch.equal(first, maps[0])


def test_pruning_keeps_what_is_asked_for() -> None:
    model, x = random_small(), images(32, 32).double()
    (expected,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert model.prune_intermediate_layers([-2]) == [0]
    assert (len(model.stages), model.num_features, model.num_classes) == (1, 8, 0)
    assert torch.equal(model(x).movedim(-1, 1), expected)

    whole = random_small()
    assert whole.prune_intermediate_layers(2, prune_norm=False, prune_head=False) == [0, 1]
    assert torch.equal(whole(x), random_small_like(whole)(x))


def random_small_like(model: torch.nn.Module) -> torch.nn.Module:
    other = random_small()
    other.load_state_dict(model.state_dict())
    return other


def test_masks_reach_the_maps() -> None:
    pyramid = FeaturePyramid(random_small(), out_indices=(0, 1))
    mask = torch.ones(2, 24, 24, dtype=torch.bool)
    mask[0, :, 13:] = False
    for feature_map, reduction in zip(pyramid(images(24, 24).double(), mask), (2, 4), strict=True):
        assert (feature_map.movedim(1, -1)[~mask[:, ::reduction, ::reduction]] == 0).all()


def test_messages() -> None:
    with pytest.raises(InvalidArgument, match=r"out_indices: expected indices of 2 stages, .* got \(0, 2\)"):
        FeaturePyramid(small(), out_indices=(0, 2))
    with pytest.raises(InvalidArgument, match=r"out_indices: .* got \(\)"):
        small().forward_intermediates(images(32, 32), indices=())
    with pytest.raises(InvalidArgument, match=r"features_only: expected a model with stages, such as sepvit_tiny, got"):
        create_model("vit_mini", features_only=True)
    with pytest.raises(InvalidArgument, match=r"output_fmt: expected one of"):
        small().forward_intermediates(images(32, 32), output_fmt="NLC")


def test_the_spelling_of_timm_is_understood() -> None:
    model = create_model("sepvit_lite", in_chans=1, img_size=64, num_classes=0, device="meta")
    assert model.channels == 1
    assert model.stages[1].blocks[1].attention.window_token is None, "at 64 pixels a single window of 14"
    assert create_model("vit_mini", in_chans=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
