from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.slot_decoders import (
    AutoregressiveDecoder,
    DecoderBlock,
    MLPDecoder,
    positions_on,
    reading_orders,
)

B, K, S, D, GRID = 2, 5, 12, 16, (3, 4)
N = GRID[0] * GRID[1]
TWO = torch.ones(1, 2, S, dtype=torch.float64)


@pytest.fixture
def slots() -> Tensor:
    return torch.randn(B, K, S, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp_decoder(**options: object) -> MLPDecoder:
    torch.manual_seed(2)
    return MLPDecoder(S, D, grid=GRID, hidden_dims=(20, 18), dtype=torch.float64, **options)  # pyright: ignore


def autoregressive(**options: object) -> AutoregressiveDecoder:
    torch.manual_seed(3)
    return AutoregressiveDecoder(S, D, depth=2, heads=4, dtype=torch.float64, **options)  # pyright: ignore


@pytest.mark.parametrize("input_dim", [None, 10])
def test_a_position_is_a_mixture_of_what_each_slot_alone_makes_of_it(slots: Tensor, input_dim: int | None) -> None:
    decoder = mlp_decoder(input_dim=input_dim)
    found = decoder(slots)
    inputs = slots if decoder.slot_map is None else decoder.slot_map(slots)
    for sample in range(B):
        for position in range(N):
            made = [decoder.mlp(inputs[sample, slot] + decoder.positions[position]) for slot in range(K)]
            shares = torch.stack([each[-1] for each in made]).softmax(0)
            torch.testing.assert_close(found.masks[sample, :, position].double(), shares, rtol=1e-5, atol=1e-6)
            expected = sum(share * each[:-1] for share, each in zip(shares, made, strict=True))
            torch.testing.assert_close(found.features[sample, position], expected, rtol=1e-5, atol=1e-6)


def test_the_most_attended_slots_are_decoded_as_if_there_were_no_others(slots: Tensor) -> None:
    decoder, attention = mlp_decoder(), torch.rand(B, K, N).softmax(1)
    found = decoder(slots, top_k=2, attention=attention)
    assert ((found.masks > 0).sum(1) == 2).all()
    for sample in range(B):
        for position in range(N):
            chosen = attention[sample, :, position].topk(2).indices.sort().values
            alone = decoder(slots[sample : sample + 1, chosen])
            torch.testing.assert_close(found.masks[sample, chosen, position], alone.masks[0, :, position])
            torch.testing.assert_close(found.features[sample, position], alone.features[0, position])
    every = decoder(slots, top_k=K, attention=attention)
    torch.testing.assert_close(every.features, decoder(slots).features)


def test_positions_of_another_grid_are_between_the_learned_ones(slots: Tensor) -> None:
    decoder = mlp_decoder()
    with torch.no_grad():
        decoder.positions.copy_(torch.linspace(0, 1, GRID[1], dtype=torch.float64).repeat(GRID[0])[:, None])
    wide = positions_on(decoder.positions, GRID, (3, 8)).unflatten(0, (3, 8))
    assert (wide[:, 1:] - wide[:, :-1] > -1e-6).all()
    assert decoder(slots, grid=(6, 8)).masks.shape == (B, K, 48)


@pytest.mark.parametrize("kind", ["mlp", "top_k", "autoregressive"])
def test_masked_slots_are_as_if_they_were_not_there(kind: str, slots: Tensor, features: Tensor) -> None:
    mask = torch.arange(K) < torch.tensor([[K], [3]])
    given = slots.masked_fill(~mask.unsqueeze(2), torch.nan if kind == "mlp" else 1e4)
    attention = torch.rand(B, K, N)
    if kind == "autoregressive":
        decoder = autoregressive().eval()
        found = decoder(given, features, mask, grid=GRID)
        alone = decoder(given[1:, :3], features[1:], grid=GRID)
    else:
        options = {"top_k": 2, "attention": attention} if kind == "top_k" else {}
        given = given.nan_to_num(3e4)
        decoder = mlp_decoder()
        found = decoder(given, mask, **options)
        options = {"top_k": 2, "attention": attention[1:, :3]} if kind == "top_k" else {}
        alone = decoder(given[1:, :3], **options)
    torch.testing.assert_close(found.features[1:], alone.features)
    torch.testing.assert_close(found.masks[1:, :3], alone.masks)
    assert not found.masks[1, 3:].any()
    assert torch.allclose(found.masks.sum(1), torch.ones(B, N, dtype=found.masks.dtype))


def reference(decoder: AutoregressiveDecoder, slots: Tensor, features: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The prediction of each patch by itself, from the patches before it alone, with softmaxes written out."""
    path = reading_orders(GRID)[order].tolist()
    read = decoder.slot_norm(decoder.slot_map(slots))
    made, masks = torch.empty_like(features), torch.empty(B, K, N, dtype=features.dtype)
    for step, patch in enumerate(path):
        before = torch.cat((decoder.first[order].expand(B, 1, -1), features[:, path[:step]]), 1)
        text = decoder.input_norm(decoder.input_map(before))
        for block in (cast(DecoderBlock, each) for each in decoder.blocks):
            normed = block.norm_self(text)
            stream = normed if block.first else text
            stream = stream + written_out(block.patches, normed, normed, causal=True)[0]
            change, weights = written_out(block.slots, block.norm_cross(stream), read, causal=False)
            stream = stream + change
            text = stream + block.contract(F.relu(block.expand(block.norm_mlp(stream))))
        made[:, patch] = decoder.norm(text)[:, -1]
        masks[:, :, patch] = weights.mean(1)[:, -1]
    return made, masks


def written_out(heads: nn.Module, readers: Tensor, read: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    width = readers.shape[-1] // heads.heads  # pyright: ignore
    maps = ((heads.to_q, readers), (heads.to_k, read), (heads.to_v, read))
    split = [to(x).unflatten(2, (-1, width)).transpose(1, 2) for to, x in maps]  # pyright: ignore
    logits = torch.einsum("bhqe,bhke->bhqk", split[0], split[1]) / width**0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = logits.softmax(-1)
    return heads.to_out(torch.einsum("bhqk,bhke->bhqe", weights, split[2]).transpose(1, 2).flatten(2)), weights  # pyright: ignore


@pytest.mark.parametrize("order", [0, 4, 8])
def test_a_patch_is_predicted_from_those_before_it_in_every_order(slots: Tensor, features: Tensor, order: int) -> None:
    decoder = autoregressive(num_orders=9, cross_heads=2).eval()
    found = decoder(slots, features, grid=GRID, order=order)
    expected, masks = reference(decoder, slots, features, order)
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.masks.double(), masks, rtol=1e-5, atol=1e-6)


def test_orders_walk_every_patch_once_and_differ() -> None:
    orders = reading_orders(GRID)
    assert (orders.sort(1).values == torch.arange(N)).all()
    assert len(orders.unique(dim=0)) == 9
    places = [divmod(patch, GRID[1]) for patch in orders[8].tolist()]
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(places))  # neighbours


def test_training_draws_orders_and_evaluation_does_not(slots: Tensor, features: Tensor) -> None:
    decoder = autoregressive(num_orders=9)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(12)]
    drawn = {decoder(slots, features, grid=GRID, generator=seed).features.sum().item() for seed in seeds}
    assert len(drawn) > 3
    decoder.eval()
    assert torch.equal(
        decoder(slots, features, grid=GRID).features, decoder(slots, features, grid=GRID, order=0).features
    )


def test_low_precision_and_gradients(slots: Tensor, features: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        low = slots.to(dtype).requires_grad_()
        for found in (
            mlp_decoder().to(dtype)(low),
            autoregressive().to(dtype)(low, features.to(dtype), grid=GRID),
        ):
            assert found.features.dtype == dtype
            assert found.masks.dtype == torch.float32
            (gradient,) = torch.autograd.grad(found.features.float().square().sum() + found.masks[:, 0].sum(), low)
            assert gradient.isfinite().all()
            assert gradient.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLPDecoder(4, 8, grid=(0, 2)), "height"),
        (lambda: MLPDecoder(4, 8, grid=(2, 2), hidden_dims=(0,)), r"hidden_dims\[0\]"),
        (lambda: mlp_decoder()(TWO, top_k=1), "attention"),
        (lambda: mlp_decoder()(TWO, top_k=3, attention=torch.rand(1, 2, N)), "top_k"),
        (lambda: AutoregressiveDecoder(4, 8, heads=3), "heads"),
        (lambda: AutoregressiveDecoder(4, 8, heads=4, num_orders=2), "num_orders"),
        (lambda: autoregressive()(torch.randn(1, 2, S), torch.randn(1, 5, D), grid=GRID), "grid"),
        (lambda: autoregressive()(torch.randn(1, 2, S), torch.randn(1, N, D), grid=GRID, order=1), "order"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()


@pytest.mark.compiled
def test_both_compile_to_one_graph(slots: Tensor, features: Tensor) -> None:
    decoder, causal = mlp_decoder().eval(), autoregressive().eval()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(slots).features, decoder(slots).features)
    torch.testing.assert_close(
        torch.compile(causal, fullgraph=True, backend="aot_eager")(slots, features, grid=GRID).features,
        causal(slots, features, grid=GRID).features,
    )
