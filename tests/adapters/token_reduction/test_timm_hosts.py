"""What users of timm do with a model beside calling it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from torch import Tensor, nn

from narrows.adapters.token_reduction import reduce_tokens, self_test
from narrows.adapters.token_reduction.hosts.timm import _first_part
from narrows.adapters.token_reduction.methods import METHODS
from tests.adapters.token_reduction.families import FAMILIES, SMALL, awake, eva, images, vit
from tests.support import assert_close, needs


def of_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens at these positions, image by image."""
    return torch.stack([row[chosen] for row, chosen in zip(tokens, ids, strict=True)])


def plain_block(block: Any, tokens: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    """A block of timm that attends for all tokens, after which those at `ids` go on."""
    read = tokens + block.attn(block.norm1(tokens), **kwargs)
    read = of_rows(read, ids)
    return read + block.mlp(block.norm2(read))


@torch.no_grad()
def test_a_pruned_vit_is_full_attention_after_which_rows_are_dropped() -> None:
    """Step by step with timm's own blocks, from the tokens that the reduction says it kept."""
    model = vit()
    with reduce_tokens(model, method="topk", budget={1: 24, 3: 10}) as reduction:
        features, logits = model.forward_features(images()), model(images())
        first, second = (routing.weights[:, 0].argmax(-1) for routing in reduction.routing)  # [B, K] positions

    states = [model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(images()))))]
    attention = _class_attention(model.blocks[1].attn, model.blocks[1].norm1(states[0]))
    expected = attention[:, 1:].topk(24, dim=1).indices.sort().values + 1
    assert torch.equal(first[:, 1:], expected)

    carried = plain_block(model.blocks[1], states[0], first)
    carried = model.blocks[2](carried)
    before = carried
    rows = torch.stack([torch.isin(a, b).nonzero()[:, 0] for a, b in zip(first, second, strict=True)])
    carried = plain_block(model.blocks[3], carried, rows)

    grid = states[0].clone()  # dropped by block 1: as they came in; by block 3: as they came in there
    for image in range(len(grid)):
        grid[image, first[image]] = before[image]
        grid[image, second[image]] = carried[image]
    assert_close(features, model.norm(grid))
    assert_close(logits, model.forward_head(model.norm(grid)))


def _class_attention(attention: Any, normed: Tensor) -> Tensor:
    query, key, _ = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (query[:, :, :1] @ key.transpose(-1, -2) * attention.scale).softmax(-1)[:, :, 0].mean(1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov3", "rope_mixed", "eva_grouped_queries"])
def test_kept_tokens_are_rotated_by_the_positions_they_had(family: str) -> None:
    model = FAMILIES[family]()
    prefix = model.num_prefix_tokens
    with reduce_tokens(model, method="topk", budget={2: 20}) as reduction:
        features = model.forward_features(images())
        ids = reduction.routing[0].weights[:, 0].argmax(-1)
    tokens, rope = model._pos_embed(model.patch_embed(images()))
    tokens = model.norm_pre(tokens)
    ropes = rope if model.rope_mixed else [rope] * 4
    for block, of_block in zip(model.blocks[:2], ropes, strict=False):
        tokens = block(tokens, rope=of_block)
    grid, block = tokens.clone(), model.blocks[2]
    gammas = [(getattr(b, "gamma_1", None), getattr(b, "gamma_2", None)) for b in model.blocks]
    one, two = (1.0 if gamma is None else gamma for gamma in gammas[2])
    read = of_rows(tokens + one * block.attn(block.norm1(tokens), rope=ropes[2]), ids)
    carried = read + two * block.mlp(block.norm2(read))
    kept_rope = apply_keep_indices_nlc(carried, ropes[3], ids[:, prefix:] - prefix)
    carried = model.blocks[3](carried, rope=kept_rope if model.rope_mixed else kept_rope[:, None])
    for image in range(len(grid)):
        grid[image, ids[image]] = carried[image]
    assert_close(features, model.norm(grid))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mean_pooled", "siglip", "dinov3", "perception_encoder"])
def test_heads_that_pool_all_tokens_use_kept_ones_only(family: str) -> None:
    model = FAMILIES[family]()
    prefix = model.num_prefix_tokens
    with reduce_tokens(model, method="topk", budget=20) as reduction:
        logits, features = model(images()), model.forward_features(images())
        kept = (reduction.routing[-1].weights[:, 0].sum(1) > 0).nonzero()[:, 1].unflatten(0, (4, -1))
        assert torch.equal(model.forward_head(features), logits)
    alone = of_rows(features, kept)  # the untouched model's own head on the kept tokens
    assert alone.shape[1] == 20 + prefix
    assert_close(logits, model.forward_head(alone))


@torch.no_grad()
def test_intermediates_and_features_are_on_the_full_grid() -> None:
    model = vit(num_classes=0)
    untouched = model.forward_intermediates(images(), intermediates_only=True)
    with reduce_tokens(model, method="topk", budget={2: 0.5}):
        last, reduced = model.forward_intermediates(images())
        assert torch.equal(last, model.forward_features(images()))
    assert [tensor.shape for tensor in reduced] == [(4, 48, 8, 8)] * 4
    assert torch.equal(reduced[1], untouched[1])
    same = (reduced[2] == untouched[1]).all(1).sum((1, 2))  # dropped by block 2: as block 1 left them
    assert same.tolist() == [32] * 4

    pyramid = awake(timm.create_model("deit3_small_patch16_224", features_only=True, patch_size=8, **SMALL))
    before = pyramid(images())
    with reduce_tokens(pyramid, budget=0.5):
        maps = pyramid(images())
        assert [each.shape for each in maps] == [each.shape for each in before]
        assert not torch.equal(maps[-1], before[-1])
    assert all(map(torch.equal, pyramid(images()), before))


@torch.no_grad()
@pytest.mark.parametrize("make", [partial(vit, dynamic_img_size=True), partial(eva, dynamic_img_size=True)])
def test_images_of_any_size_pass_and_a_share_is_of_their_own_tokens(make: Callable[[], nn.Module]) -> None:
    model = make()
    with reduce_tokens(model, method="topk", budget=0.25) as reduction:
        for height, width in ((64, 64), (48, 80), (80, 40)):
            model(images(2, 80)[..., :height, :width])
            (routing,) = reduction.routing
            assert routing.grid == (height // 8, width // 8)
            assert routing.num_carriers == 1 + int(height * width / 64 / 4 + 0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boolean", "added", "causal"])
@pytest.mark.parametrize("make", [vit, eva])
def test_attention_masks_are_honoured(make: Callable[[], nn.Module], kind: str) -> None:
    if make is eva or kind == "causal":
        needs("timm", "1.0.26")
    model = make()
    readable = torch.rand(4, 1, 65, 65, generator=torch.Generator().manual_seed(2)) < 0.7
    readable[..., 0] = True
    bias = torch.randn(4, 3, 65, 65, generator=torch.Generator().manual_seed(2))
    mask: dict[str, Any] = {"boolean": {"attn_mask": readable}, "added": {"attn_mask": bias}}.get(
        kind, {"is_causal": True}
    )
    untouched = model(images(), **mask)
    assert not torch.allclose(untouched, model(images()), atol=1e-2)
    with reduce_tokens(model, method=self_test.KeepAll(), budget=1.0):
        assert_close(model(images(), **mask), untouched)
    # A token that nobody may read is as good as none: what it holds must not matter to the others.
    closed = torch.ones(65, 65, dtype=torch.bool)
    closed[:, 40:] = False
    changed = images().clone()
    changed[:, :, 40:] += 10.0  # patches of rows 5 to 7: tokens 41 to 64
    with reduce_tokens(model, method="topk", budget=20) as reduction:
        if model.global_pool == "token":
            assert_close(model(images(), attn_mask=closed), model(changed, attn_mask=closed))
            assert not reduction.routing[0].weights[..., 40:].any()
    with reduce_tokens(model, method="tome"), pytest.raises(ValueError, match="attn_mask: expected none"):
        model(images(), attn_mask=closed)


@pytest.mark.parametrize("execution", ["static", "ragged"])
@pytest.mark.parametrize("make", [partial(vit, drop_path_rate=0.4), partial(eva, proj_drop_rate=0.2)])
def test_gradient_checkpointing_changes_nothing(make: Callable[[], nn.Module], execution: str) -> None:
    model = make().train()
    parameters = list(model.parameters())

    def gradients(checkpointing: bool) -> tuple[Tensor, ...]:
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        loss = model(images()).square().sum() + model(images().flip(0)).square().sum()  # two calls, one backward
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    with reduce_tokens(model, budget=0.5, execution=execution):
        for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
            assert (plain is None) == (checkpointed is None)
            if plain is not None:
                assert_close(checkpointed, plain)


@pytest.mark.parametrize("execution", ["static", "ragged"])
def test_stochastic_depth_leaves_out_whole_images(execution: str) -> None:
    """With everything kept, what it draws and what it leaves out is what the untouched model would."""
    model = vit(drop_path_rate=0.5).train()
    torch.manual_seed(3)
    untouched = model(images(8))
    with reduce_tokens(model, method=self_test.KeepAll(), budget={1: 1.0}, execution=execution):
        torch.manual_seed(3)
        assert_close(model(images(8)), untouched)


# EViT's weights of the fused token follow attention and, as every choice, carry no gradient.
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"evit"}))
def test_gradients_are_those_of_the_reduced_function(method: str) -> None:
    """Against finite differences, in float64, for images whose kept tokens do not change."""
    model = vit(embed_dim=12, depth=3, img_size=32, qkv_bias=True).double()
    start = images(1, 32).double()
    with reduce_tokens(model, method=method, budget={1: 0.5}):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        image = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(image).sum(), image)
        step = 1e-6
        with torch.no_grad():
            difference = (model(start + step * direction) - model(start - step * direction)).sum() / (2 * step)
        assert_close((gradient * direction).sum(), difference, 1e-6)


def test_random_tokens_in_training_come_from_the_generator() -> None:
    model = vit().train()
    results = []
    for seed in (0, 0, 1):
        with reduce_tokens(model, method="random", generator=torch.Generator().manual_seed(seed)):
            results.append(model(images()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_half_precision_and_autocast() -> None:
    with torch.no_grad():
        for method in METHODS:
            model = vit().to(torch.bfloat16)
            with reduce_tokens(model, method=method):
                assert model(images().bfloat16()).dtype == torch.bfloat16
            model = vit()
            with reduce_tokens(model, method=method), torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.isfinite(model(images())).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_of_a_linear_map(bias: bool) -> None:
    module, rows = nn.Linear(4, 6, bias=bias), torch.randn(2, 5, 4)
    assert_close(_first_part(module, rows, 3), module(rows)[..., :3])
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    assert_close(_first_part(module, rows, 3), module(rows)[..., :3])
    assert len(calls) == 2
