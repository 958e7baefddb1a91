import pytest
import torch

from narrows.data.images import MEAN_AND_STD
from narrows.errors import InvalidArgument
from narrows.hub.parts import ClassifierEncoder, TimmEncoder, open_language_model, open_vision_encoder
from narrows.models import create_model
from tests.hub.flamingo_parts import ENCODER, save_parts
from tests.support import assert_close


@pytest.mark.parametrize(("name", "tokens"), [("vit_mini", 1), ("sepvit_mini", 16)])
def test_a_classifier_gives_what_its_head_reads(name, tokens):
    classifier = create_model(name, channels=1, image_size=32).eval()
    encoder, pictures = ClassifierEncoder(classifier), torch.rand(2, 1, 32, 32)
    found = encoder(pictures)
    (mean,), (std,) = MEAN_AND_STD[1]
    assert found.shape[:2] == (2, tokens)
    assert_close(found, classifier.forward_features((pictures - mean) / std).reshape(found.shape))
    assert encoder.num_features == found.shape[-1]
    assert (encoder.image_size, encoder.channels) == (32, 1)


@pytest.mark.parametrize(("name", "tokens"), [("test_vit", 101), ("test_resnet", 25)])
def test_a_timm_model_gives_its_last_features_as_tokens(name, tokens):
    encoder = TimmEncoder(name, pretrained=False).eval()
    pictures = torch.rand(2, encoder.channels, encoder.image_size, encoder.image_size)
    found = encoder(pictures)
    assert found.shape == (2, tokens, encoder.num_features)
    assert encoder.name == f"timm/{name}"
    features = encoder.model.forward_features((pictures - encoder.mean) / encoder.std)
    assert_close(found, features.flatten(2).transpose(1, 2) if features.ndim == 4 else features)


def test_a_folder_is_opened_frozen_and_in_evaluation_mode(tmp_path):
    _, folder = save_parts(tmp_path)
    encoder = open_vision_encoder(folder)
    assert encoder.image_size == ENCODER["image_size"]
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_language_model_comes_with_its_tokenizer(tmp_path):
    folder, _ = save_parts(tmp_path)
    model, tokenizer = open_language_model(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert not model.training


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match=r"vision_encoder: expected a folder with a narrows classifier, or timm/"):
        open_vision_encoder(tmp_path / "nope")
    with pytest.raises(InvalidArgument, match=r"vision_encoder: expected a model of timm, got 'no_such'"):
        open_vision_encoder("timm/no_such")
    with pytest.raises(InvalidArgument, match=r"language_model: expected a folder or a hub name"):
        open_language_model(tmp_path)
