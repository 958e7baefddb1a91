"""What reduced blocks do with unusual precision, tokens, hooks and derivatives."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.errors import InvalidArgument, NarrowsError
from tests.adapters.token_reduction.families import SMALL, images, vit
from tests.adapters.token_reduction.test_reduce import state
from tests.support import assert_close

every_method = pytest.mark.parametrize("method", METHODS)


def grow(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
    """A hook: one channel of the residual stream beyond what float16 holds, and beyond the mantissa of bfloat16."""
    return tokens + 100_003.0 * torch.eye(48)[0]


@every_method
@torch.no_grad()
def test_autocast_rounds_no_token_that_nothing_was_merged_into(method: str) -> None:
    model = vit()
    model.norm_pre.register_forward_hook(grow)
    seen: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.float16), reduce_tokens(model, method=method, budget={2: 0.6}):
        assert torch.isfinite(model(images())).all()
    assert seen[-1].dtype == torch.float32
    assert torch.isfinite(seen[-1]).all()
    assert (seen[-1][..., 0] % 32 != 0).any()  # neighbours in bfloat16 are 512 apart, in float16 it is infinite


class Prompted(VisionTransformer):
    """Five more tokens, where nobody expects them."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)
        return torch.cat((tokens[:, :1], tokens.new_zeros(len(tokens), 5, tokens.shape[-1]), tokens[:, 1:]), 1)


def test_tokens_that_the_host_did_not_announce_are_refused() -> None:
    model = Prompted(**SMALL, patch_size=8).eval()  # pyright: ignore
    before = state(model)
    with pytest.raises(InvalidArgument, match="1 special ones and a grid of 8 x 8, got 70 tokens"):
        reduce_tokens(model)
    assert state(model) == before
    added = vit()
    with reduce_tokens(added):
        added.norm_pre.register_forward_hook(lambda _, __, tokens: torch.cat((tokens, tokens[:, :3]), 1))
        with pytest.raises(InvalidArgument, match="got 68 tokens"):
            added(images())


@torch.no_grad()
def test_a_reader_that_changes_later_is_followed() -> None:
    """Mean pooling in the place of the class token: scores, and what is averaged, are those of such a model."""
    pooled, changed = vit(), vit()
    pooled.reset_classifier(10, global_pool="avg")
    with reduce_tokens(pooled, method="topk", budget=20), reduce_tokens(changed, method="topk", budget=20):
        changed.reset_classifier(10, global_pool="avg")
        changed.head.load_state_dict(pooled.head.state_dict())
        assert torch.equal(changed(images()), pooled(images()))


class OfMAE(VisionTransformer):
    """As the code of masked autoencoders fine-tunes it: `global_pool` is a truth value and `norm` may be gone."""

    def __init__(self, *, average: bool) -> None:
        super().__init__(**SMALL, patch_size=8)  # pyright: ignore
        self.global_pool = average
        if average:
            self.fc_norm = nn.LayerNorm(48)
            del self.norm

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            tokens = block(tokens)
        return self.fc_norm(tokens[:, 1:].mean(1)) if self.global_pool else self.norm(tokens)[:, 0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize("average", [True, False])
def test_a_forward_that_somebody_wrote_anew_runs_and_is_named(average: bool) -> None:
    model = OfMAE(average=average).eval()
    untouched = model(images())
    with pytest.warns(UserWarning, match=r"OfMAE\.forward_features.* may average over tokens"):
        reduction = reduce_tokens(model, method="topk")
    with reduction:
        assert not torch.equal(model(images()), untouched)
    assert torch.equal(model(images()), untouched)


def test_observers_of_what_a_reducing_block_does_without_are_refused() -> None:
    model = vit()
    heard: list[int] = []
    with reduce_tokens(model, method="topk", budget={1: 0.5}):
        expected = model(images())
        for module in (model.blocks[1].attn, model.blocks[1].attn.attn_drop):
            handle = module.register_forward_hook(lambda *_: None)
            with pytest.raises(InvalidArgument, match=r"of block 1, which reduces.*got a hook"):
                model(images())
            handle.remove()
        model.blocks[1].attn.forward = lambda tokens, **_: tokens
        with pytest.raises(InvalidArgument, match="a forward in place of its own"):
            model(images())
        del model.blocks[1].attn.forward
        # In a block that keeps what comes, everything is called, with the tokens that are left.
        model.blocks[2].attn.register_forward_hook(lambda _, args, __: heard.append(args[0].shape[1]))
        model.blocks[1].attn.qkv.register_forward_hook(lambda _, args, __: heard.append(args[0].shape[1]))
        assert torch.equal(model(images()), expected)
        own = model.blocks[2].attn.forward
        model.blocks[2].attn.forward = lambda tokens, **rest: 0 * own(tokens, **rest)
        assert not torch.equal(model(images()), expected)
    assert heard[:2] == [65, 33]
    with pytest.raises(InvalidArgument, match="which reduces"):
        reduce_tokens(model, method="topk", budget={2: 0.5})


@torch.no_grad()
def test_a_count_that_merging_cannot_reach_on_larger_images_is_refused() -> None:
    model = vit(dynamic_img_size=True)
    with reduce_tokens(model, method="tome", budget=33) as reduction:
        model(images(2, 64))
        with pytest.raises(InvalidArgument, match=r"budget: expected at least \d+ of the \d+ tokens .* shares"):
            model(images(2, 96))
        model(images(2, 64))
        assert reduction.routing[-1].num_carriers == 34


@every_method
def test_derivatives_beyond_the_first(method: str) -> None:
    """Of second order and forward, where the host uses no fused kernel, which has neither."""
    model = vit(embed_dim=12, depth=3, img_size=32).double()
    for block in model.blocks:
        block.attn.fused_attn = False
    start = images(2, 32).double().requires_grad_()  # two, whose rows are packed where they may be
    with reduce_tokens(model, method=method, budget={1: 0.5}):
        (gradient,) = torch.autograd.grad(model(start).square().sum(), start, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), start)
        assert second.abs().sum() > 0
        direction = torch.randn_like(start)
        _, forward = torch.func.jvp(model, (start.detach(),), (direction.detach(),))
        (backward,) = torch.autograd.grad(model(start).sum(), start)
        if method != "evit":  # its weights of the fused token carry no gradient, and a tangent no less
            assert_close(forward.sum(), (backward * direction).sum(), 1e-8)


@every_method
@torch.no_grad()
def test_vmap_over_images_gives_what_a_batch_gives(method: str) -> None:
    model = vit()
    with reduce_tokens(model, method=method, execution="static"):
        each = torch.func.vmap(lambda image: model(image[None])[0])(images())
        assert_close(each, model(images()), 1e-5)


@every_method
@pytest.mark.parametrize("execution", ["auto", "static", "ragged"])
def test_an_empty_batch(method: str, execution: str) -> None:
    model = vit()
    with reduce_tokens(model, method=method, execution=execution):
        assert model(images()[:0]).shape == (0, 10)


def test_a_bottleneck_after_the_reduction_is_noticed() -> None:
    model = vit()
    with reduce_tokens(model, method="topk", budget={1: 0.5}):
        model.blocks[2].register_forward_hook(lambda _, __, output: output[:, :9])
        with pytest.raises(NarrowsError, match="replaced the tokens"):
            model(images())
