"""Why `narrows reduce` trains its own model on small digits: there it matters which tokens are kept."""

import pytest
import torch
from torch.nn import functional as F

import narrows
from narrows.data import DigitScenes
from narrows.demo import vit


@pytest.mark.slow
def test_of_small_digits_random_tokens_lose_what_chosen_ones_keep() -> None:
    """The job in small: 64 tokens, of which a digit covers about nine, and some seconds of training."""

    def drawn(split: str) -> DigitScenes:
        return DigitScenes(split, size=32, digit_size=(9.0, 12.0))

    torch.manual_seed(0)
    shape = {"depth": 2, "dim": 48, "mlp_dim": 96, "global_pool": vit.MODEL["global_pool"]}
    model = narrows.create_model("vit_mini", channels=1, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    for step in range(170):
        epoch, batch = divmod(step, 90)
        images, labels = drawn("train").batch(range(64 * batch, 64 * batch + 64), epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = drawn("held_out").batch(range(500))

    @torch.no_grad()
    def accuracy() -> float:
        return (model(images).argmax(1) == labels).float().mean().item()

    model.eval()
    reached = {"untouched": accuracy()}
    for method in ("topk", "ats", "random"):
        with narrows.reduce_tokens(model, method=method, budget={0: 0.5}):
            reached[method] = accuracy()
    assert reached["untouched"] > 0.45
    assert reached["topk"] >= reached["untouched"] - 0.03
    assert reached["random"] <= reached["topk"] - 0.15
    assert reached["random"] <= reached["ats"] - 0.05
