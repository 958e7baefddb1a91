"""What the plain vision transformer reads: the mean of all tokens, the greatest of them, or its class token."""

import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.models import create_model, load_model


def test_with_a_class_token_that_is_what_the_head_reads(tmp_path):
    model = create_model("vit_mini", global_pool="token").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.blocks(model.embedding(images))
    assert tokens.shape[1] == 65
    assert torch.equal(model.forward_features(images), model.norm(tokens[:, 0]))
    assert "embedding.class_token" in model.state_dict()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(images), model(images))


def test_without_one_it_is_the_mean_of_all_tokens():
    model = create_model("vit_mini").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.blocks(model.embedding(images))
    assert torch.equal(model.forward_features(images), model.norm(tokens).mean(1))


def test_or_in_every_channel_the_greatest_of_them(tmp_path):
    model = create_model("vit_mini", global_pool="max").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.norm(model.blocks(model.embedding(images)))
    assert torch.equal(model.forward_features(images), tokens.amax(1))
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).global_pool == "max"


def test_another_pooling_is_refused():
    with pytest.raises(InvalidArgument, match=r"global_pool: expected one of .*'max'.*, got 'mean'"):
        create_model("vit_mini", global_pool="mean")
