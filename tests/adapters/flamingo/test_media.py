"""Media as people have them: lists of unequal ones, clips of unequal length, encoders with the channels last."""

import pytest
import timm
import torch
from torch import Tensor, nn

from narrows.adapters.flamingo import Flamingo
from narrows.adapters.flamingo.media import stack_media
from narrows.errors import InvalidArgument, InvalidType
from tests.adapters.flamingo.hosts import LATENT_DIM, flamingo, language_model, text
from tests.support import assert_close


class Counting(nn.Conv2d):
    """Counts the images that it encodes."""

    encoded = 0

    def forward(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return super().forward(images)


@pytest.fixture(scope="module")
def seeing() -> Flamingo:
    torch.manual_seed(0)
    return flamingo(language_model("llama"), vision_encoder=Counting(3, LATENT_DIM, 4, 4))


@pytest.fixture(scope="module")
def hearing() -> Flamingo:
    return flamingo(language_model("llama"))


def logits(model: Flamingo, tokens: Tensor, media: object, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, media=media, use_cache=False, **kwargs).logits


ROWS = ("a#b#c#", "def#gh", "ijklmn")


@pytest.mark.parametrize("of", [list, tuple])
def test_a_list_has_the_media_of_each_row(seeing: Flamingo, of: type) -> None:
    tokens, images = text(*ROWS), [torch.randn(count, 3, 8, 8) for count in (3, 1, 0)]
    together = logits(seeing, tokens, of(images))
    assert torch.equal(logits(seeing, tokens, of(of(row) for row in images)), together)
    for row, own in enumerate(images):
        assert_close(together[row : row + 1], logits(seeing, tokens[row : row + 1], own[None]), 1e-5)
    written = seeing.generate(tokens, media=images, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        written[1:2], seeing.generate(tokens[1:2], media=images[1][None], max_new_tokens=3, do_sample=False)
    )


def test_a_list_may_have_media_of_different_lengths(seeing: Flamingo, hearing: Flamingo) -> None:
    tokens = text("a#b#c", "d#efg")
    sounds = [[torch.randn(3, LATENT_DIM), torch.randn(7, LATENT_DIM)], [torch.randn(5, LATENT_DIM)]]
    clips = [[torch.randn(2, 3, 8, 8), torch.randn(4, 3, 8, 8)], [torch.randn(3, 3, 8, 8)]]
    for model, of_model in ((hearing, sounds), (seeing, clips)):
        together = logits(model, tokens, of_model)
        assert_close(together[1:], logits(model, tokens[1:], of_model[1][0][None, None]), 1e-5)
        first = logits(model, tokens[:1, :3], of_model[0][0][None, None])
        assert_close(together[:1, :3], first, 1e-5)


def test_clips_of_unequal_length_have_a_mask_of_frames(seeing: Flamingo) -> None:
    clips, mask = torch.randn(1, 2, 5, 3, 8, 8), torch.ones(1, 2, 5, dtype=torch.bool)
    mask[0, 1, 3:] = False
    clips[~mask] = torch.nan
    seeing.vision_encoder.encoded = 0
    read = logits(seeing, text("a#b#c"), clips, media_mask=mask)
    assert seeing.vision_encoder.encoded == 8
    alone = logits(seeing, text("#c"), clips[:, 1:, :3])
    assert_close(logits(seeing, text("#c"), clips[:, 1:], media_mask=mask[:, 1:]), alone, 1e-5)
    mask[0, 1] = False  # no frame: no clip
    assert_close(logits(seeing, text("a#bc"), clips, media_mask=mask)[:, :3], read[:, :3], 1e-5)


@pytest.mark.parametrize("kind", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_maps_of_timm_with_channels_last_and_first(kind: str) -> None:
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 16, "patch_size": 2, "window_size": 4}
    encoder = timm.create_model(kind, **(small if "swin" in kind else {})).eval()
    model = flamingo(language_model("llama"), vision_encoder=encoder, media_dim=None)
    assert model.resampler.dim == encoder.num_features
    images = torch.randn(1, 1, 3, 16, 16)
    features = encoder.forward_features(images[0])
    tokens = features.flatten(1, 2) if "swin" in kind else features.flatten(2).transpose(1, 2)
    bare = flamingo(language_model("llama"), media_dim=encoder.num_features)
    added = {name: value for name, value in model.state_dict().items() if name.startswith(("resampler", "blocks"))}
    bare.load_state_dict(added, strict=False)
    assert_close(logits(model, text("a#bc"), images), logits(bare, text("a#bc"), tokens[None]), 1e-5)


def test_what_is_wrong_with_a_list_is_said() -> None:
    with pytest.raises(InvalidArgument, match="media_mask: expected None with a list"):
        stack_media([torch.randn(1, 3, 8, 8)], torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="media that differ in their first axis alone"):
        stack_media([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 9)], None)
    with pytest.raises(InvalidType, match="a list with str in it"):
        stack_media([["a.png"]], None)
