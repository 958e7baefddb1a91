"""The vision transformers: what the head reads, and what the one that samples its tokens does."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from narrows.costs import count_macs, macs_per_sample
from narrows.errors import InvalidArgument, InvalidType
from narrows.models import ATSViT, create_model, load_model
from tests.layers.test_soft_moe import as_saved_before
from tests.support import assert_close


def test_the_head_reads_the_class_token_where_there_is_one(tmp_path):
    model = create_model("vit_mini", global_pool="token").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.blocks(model.embedding(images))
    assert tokens.shape[1] == 65
    assert torch.equal(model.forward_features(images), model.norm(tokens[:, 0]))
    assert "embedding.class_token" in model.state_dict()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(images), model(images))


def test_the_head_reads_the_mean_of_all_tokens_without_a_class_token():
    model = create_model("vit_mini").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.blocks(model.embedding(images))
    assert torch.equal(model.forward_features(images), model.norm(tokens).mean(1))


def test_the_head_reads_the_greatest_of_every_channel_with_max_pooling(tmp_path):
    model = create_model("vit_mini", global_pool="max").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.norm(model.blocks(model.embedding(images)))
    assert torch.equal(model.forward_features(images), tokens.amax(1))
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).global_pool == "max"


def test_another_pooling_is_refused():
    with pytest.raises(InvalidArgument, match=r"global_pool: expected one of .*'max'.*, got 'mean'"):
        create_model("vit_mini", global_pool="mean")


def test_a_folder_of_an_older_release_opens(tmp_path):
    model = create_model("soft_moe_vit_mini").eval()
    model.save_pretrained(tmp_path)
    save_file(as_saved_before(model.state_dict()), tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert_close(load_model(tmp_path)(images), model(images))


SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 24}


def build(**kwargs: object) -> ATSViT:
    torch.manual_seed(0)
    model = ATSViT(**{**SIZES, "keep": (None, 10, 4), **kwargs}).eval()
    for module in model.modules():  # sharp attention, so that images keep different numbers of tokens
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
    return model


def images(batch: int = 3, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def plain_tokens(model: ATSViT, images: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Image by image, without a single slot too many: rows really removed."""
    results = []
    for image in images.split(1):
        tokens, ids = model.embedding(image), torch.arange(1 + model.embedding.side**2)
        for block in model.blocks:
            normed = block.attention_norm(tokens)
            if block.samples:
                attended = block.attention(normed)
                kept = attended.ids[0, attended.mask[0]]
                tokens, ids = tokens[:, kept] + attended.tokens[:, attended.mask[0]], ids[kept]
            else:
                tokens = tokens + block.attention(normed)
            tokens = tokens + block.feed_forward(block.feed_forward_norm(tokens))
        results.append((model.norm(tokens)[0], ids.tolist()))
    return results


@pytest.mark.parametrize(
    "keep",
    [(None, 10, 4), (10, None, 4), (8, 8, 8), (16, 16, 16), (0.5, 0.3, None), (None, None, None), (3, 12, 1)],
    ids=str,
)
def test_static_slots_give_what_removed_rows_give(keep: tuple[float | None, ...]) -> None:
    """Slots that hold no token (upstream: copies of the class token, attended to and from) change nothing."""
    model = build(keep=keep).double()
    found = model.forward_tokens(images().double())
    for b, (tokens, ids) in enumerate(plain_tokens(model, images().double())):
        assert found.ids[b, found.mask[b]].tolist() == ids
        assert_close(found.tokens[b, found.mask[b]], tokens, 1e-10)
        assert (found.tokens[b, ~found.mask[b]] == 0).all()
    assert_close(model.forward_features(images().double()), found.tokens[:, 0], 1e-12)


def test_budgets_are_counts_shares_or_nothing() -> None:
    def capacities(keep: list[float | None]) -> list[tuple[int, bool] | None]:
        blocks = build(keep=keep).blocks
        samplers = [block.attention.sampler if block.samples else None for block in blocks]
        return [sampler and (sampler.num_tokens, sampler.sample_always) for sampler in samplers]

    assert capacities([None, 0.5, 3]) == [None, (8, False), (3, False)]
    assert capacities([16, 1.0, 0.01]) == [(16, True), (16, True), (1, False)]
    assert capacities([6, 12, 6]) == [(6, False), (12, True), (6, True)]


def test_one_budget_holds_from_a_quarter_of_the_depth_on() -> None:
    """As one of `reduce_tokens` does."""

    def capacities(keep: float) -> list[tuple[int, bool] | None]:
        blocks = ATSViT(**{**SIZES, "depth": 5, "keep": keep}).blocks
        samplers = [block.attention.sampler if block.samples else None for block in blocks]
        return [sampler and (sampler.num_tokens, sampler.sample_always) for sampler in samplers]

    assert capacities(0.5) == [None, (8, False), None, None, None]
    assert capacities(16) == capacities(1.0) == [None, *[(16, True)] * 4]
    with pytest.raises(InvalidArgument, match=r"keep: expected shares above 0 and at most 1, got 1\.5"):
        build(keep=1.5)


def test_equal_budgets_keep_sampling_where_upstream_stops() -> None:
    """The paper's schedule: as many as there are, in every block, adapting to the image."""
    routings = build(keep=(16, 16, 16)).routing(images(8))
    counts = torch.stack([routing.weights.sum((1, 2, 3)) for routing in routings])
    assert (counts[0] < 16).all()
    assert (counts.diff(dim=0) < 0).all(), "each block drops more"
    assert len(counts[-1].unique()) > 1, "not every image keeps as many"


def test_routing_maps_every_block_to_the_original_grid() -> None:
    model = build()
    first, second = model.routing(images())
    assert (first.name, second.name) == ("blocks.1", "blocks.2")
    assert first.maps().shape == (3, 10, 4, 4)
    assert second.maps().shape == (3, 4, 4, 4)
    last = model.forward_tokens(images())
    for b in range(3):
        survivors = second.maps()[b].sum(0).flatten()
        assert (survivors.nonzero().flatten() + 1).tolist() == last.ids[b, last.mask[b]].tolist()[1:]
        assert (survivors <= first.maps()[b].sum(0).flatten()).all(), "a token came back"


def test_feature_map_holds_dropped_tokens_in_their_last_state() -> None:
    model = build()
    found = model.feature_map(images())
    assert found.shape == (3, 4, 4, 16)
    kept = model.forward_tokens(images())
    tokens = model.embedding(images())
    before_sampling = model.norm(tokens)  # what a token dropped by the first block would show
    for b in range(3):
        rows = kept.ids[b, kept.mask[b]][1:]
        assert_close(found[b].flatten(0, 1)[rows - 1], kept.tokens[b, kept.mask[b]][1:])
    only_first = build(keep=(10, None, None))
    survivors = only_first.forward_tokens(images())
    for b in range(3):
        dropped = [n for n in range(1, 17) if n not in survivors.ids[b].tolist()]
        assert_close(
            only_first.feature_map(images())[b].flatten(0, 1)[[n - 1 for n in dropped]], before_sampling[b, dropped]
        )


def test_an_image_keeps_its_tokens_whatever_the_rest_of_the_batch() -> None:
    model = build(keep=(12, 8, 3)).double()
    together = model.forward_tokens(images(6).double())
    for b in range(6):
        alone = model.forward_tokens(images(6).double()[b : b + 1])
        assert torch.equal(alone.ids[0], together.ids[b])
        assert_close(alone.tokens[0], together.tokens[b], 1e-10)


def test_macs_are_counted_with_the_tokens_really_kept() -> None:
    model, batch = build(), images(2)

    def block(tokens: int, kept: int, samples: bool) -> int:
        d, mlp = 16, 24
        # Keys and values, queries and results, the class token's query; its scores, attention, feed-forward.
        projections = (2 * tokens + 2 * kept + samples) * d * d
        return projections + samples * tokens * d + 2 * kept * tokens * d + 2 * kept * d * mlp

    expected = 0
    for b in range(2):
        a, c = (1 + int(routing.weights[b].sum()) for routing in model.routing(batch))
        expected += 16 * 192 * 16 + block(17, 17, False) + block(17, a, True) + block(a, c, True) + 16 * 5
    assert macs_per_sample(model, batch, batch=2) == expected / 2
    assert count_macs(lambda: model(batch)) > expected


def test_smaller_images_get_interpolated_positions() -> None:
    """Upstream takes the first rows of the table, and fails on larger images."""
    model = build()
    for side in (24, 40):
        found = model.routing(images(2, side))[0]
        assert found.grid == (side // 8, side // 8)
        assert torch.isfinite(model(images(2, side))).all()
    positions = model.embedding.positions
    assert not torch.equal(model.embedding._positions((3, 3))[:, 1:], positions[:, 1:10])


def test_gumbel_sampling_follows_the_seed() -> None:
    model = build(sampling="gumbel", keep=(6, None, 3))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.forward_tokens(images()).ids)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_is_for_training() -> None:
    model = build(dropout=0.4)
    assert_close(model(images()), build()(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))


@pytest.mark.compiled
def test_the_model_is_one_graph_and_exports() -> None:
    torch._dynamo.reset()
    model = build()
    expected = model(images())
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), expected)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {"images": images()}, dynamic_shapes=shapes, strict=False).module()
    assert_close(program(images=images(5)), model(images(5)))


def test_errors_name_the_argument() -> None:
    with pytest.raises(InvalidArgument, match="keep: expected one entry for each of the 3 blocks, got 2"):
        build(keep=(4, 2))
    with pytest.raises(InvalidArgument, match=r"keep: expected shares above 0 and at most 1, got 1\.5"):
        build(keep=(None, 1.5, None))
    with pytest.raises(InvalidArgument, match="keep: expected counts of at most the 16 patches, got 17"):
        build(keep=(None, None, 17))
    with pytest.raises(InvalidArgument, match="keep: expected a positive integer, got 0"):
        build(keep=(0, None, None))
    with pytest.raises(InvalidType, match="keep: expected an integer, a finite number or a sequence, each an"):
        build(keep=(True, None, None))
    with pytest.raises(InvalidArgument, match="sampling: expected one of"):
        build(sampling="topk")
