"""What the plain vision transformer reads: the mean of all tokens, or its class token."""

import torch

from narrows.models import create_model, load_model


def test_with_a_class_token_that_is_what_the_head_reads(tmp_path):
    model = create_model("vit_mini", class_token=True).eval()
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
