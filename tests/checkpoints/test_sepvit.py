"""Checkpoints with the names of the paper's release, made here: nobody publishes one that could be loaded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from narrows.checkpoints import read_sepvit
from narrows.errors import InvalidArgument
from tests.support import assert_close

WIDTHS, DEPTHS, WINDOWS = (32, 64, 64, 96), (1, 2, 2, 1), ((7,), (7, 14), (7, 14), (7,))


def official(*, dense: bool = False, classes: int = 11) -> dict[str, Tensor]:
    """A state dict of theirs, small and random; a dense one has no window tokens and exchange in every block."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, norm: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(shape) * 0.2 + float(norm)
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.2

    incoming = 3
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        kernel = 7 if stage == 0 else 3
        layer(f"patch_embeds.{stage}.proj", width, incoming, kernel, kernel)
        layer(f"patch_embeds.{stage}.norm", width, norm=True)
        layer(f"pos_block.{stage}.proj.0", width, 1, 3, 3)
        for block in range(depth):
            name, size = f"blocks.{stage}.{block}", WINDOWS[stage][block % len(WINDOWS[stage])]
            windows = (56 // 2**stage // size) ** 2
            layer(f"{name}.norm1", width, norm=True)
            layer(f"{name}.attn.DSA_qkv", 3 * width, width)
            if dense or windows > 1:
                layer(f"{name}.attn.win_tokens_norm", width, norm=True)
                layer(f"{name}.attn.PSA_qk", 2 * width, width)
            if not dense and windows > 1:
                state[f"{name}.win_tokens"] = torch.randn(1, windows, 1, width)
            layer(f"{name}.attn.proj", width, width)
            layer(f"{name}.norm2", width, norm=True)
            layer(f"{name}.mlp.fc1", 4 * width, width)
            layer(f"{name}.mlp.fc2", width, 4 * width)
        incoming = width
    if not dense:
        layer("norm", WIDTHS[-1], norm=True)
        layer("head", classes, WIDTHS[-1])
    return state


def test_every_weight_arrives_where_it_belongs() -> None:
    state = official()
    model = read_sepvit({"model": state})
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(map(torch.numel, state.values()))
    assert [[b.attention.window_size for b in stage.blocks] for stage in model.stages] == [[7], [7, 14], [7, 14], [7]]
    assert [stage.blocks[0].attention.heads for stage in model.stages] == [1, 2, 2, 3]
    stage, block = model.stages[1], model.stages[1].blocks[1]
    for ours, theirs in [
        (stage.embedding.weight, "patch_embeds.1.proj.weight"),
        (stage.embedding_norm.bias, "patch_embeds.1.norm.bias"),
        (stage.position.weight, "pos_block.1.proj.0.weight"),
        (block.attention.norm.weight, "blocks.1.1.norm1.weight"),
        (block.attention.qkv.weight, "blocks.1.1.attn.DSA_qkv.weight"),
        (block.attention.window_norm.weight, "blocks.1.1.attn.win_tokens_norm.weight"),
        (block.attention.window_query_key.bias, "blocks.1.1.attn.PSA_qk.bias"),
        (block.attention.out.weight, "blocks.1.1.attn.proj.weight"),
        (block.feed_forward_norm.weight, "blocks.1.1.norm2.weight"),
        (block.feed_forward[0].weight, "blocks.1.1.mlp.fc1.weight"),
        (block.feed_forward[3].weight, "blocks.1.1.mlp.fc2.weight"),
        (model.norm.weight, "norm.weight"),
        (model.head.weight, "head.weight"),
    ]:
        assert torch.equal(ours, state[theirs])


def test_a_window_token_stands_at_its_window() -> None:
    """Theirs are in raster order of the windows."""
    state = official()
    model = read_sepvit(state)
    for stage, block, side in [(0, 0, 8), (1, 0, 4), (1, 1, 2), (2, 0, 2)]:
        tokens = state[f"blocks.{stage}.{block}.win_tokens"]
        ours = model.stages[stage].blocks[block].attention.window_token
        assert ours.shape[:2] == (side, side)
        for y in range(side):
            for x in range(side):
                assert torch.equal(ours[y, x], tokens[0, y * side + x, 0])
    assert model.stages[2].blocks[1].attention.window_token is None


def test_shared_tokens_are_their_mean_and_run_with_masks() -> None:
    state = official()
    for name in [name for name in state if name.endswith("win_tokens")]:
        state[name] = state[name][:, :1].expand_as(state[name]) + 0
    each, shared = read_sepvit(state).eval(), read_sepvit(state, window_tokens="shared").eval()
    images = torch.randn(1, 3, 112, 140)
    assert_close(shared(images), each(images), 1e-5)
    assert shared(images, torch.ones(1, 112, 140, dtype=torch.bool)).shape == (1, 11)

    state = official()
    token = read_sepvit(state, window_tokens="shared").stages[0].blocks[0].attention.window_token
    assert_close(token[0, 0], state["blocks.0.0.win_tokens"].mean(1)[0, 0], 1e-6)


def test_dense_checkpoints_have_zero_tokens_and_exchange_in_every_block() -> None:
    model = read_sepvit(official(dense=True)).eval()
    assert (model.num_classes, model.norm.weight.tolist()) == (0, [1.0] * 96)
    layers = [block.attention for stage in model.stages for block in stage.blocks]
    assert [layer.window_size for layer in layers] == [7, 7, 14, 7, 14, 7]
    assert all((layer.window_token == 0).all() and layer.window_query_key is not None for layer in layers)
    assert [tuple(each.shape[2:]) for each in model.forward_intermediates(torch.randn(1, 3, 64, 96))[1]] == [
        (16, 24), (8, 12), (4, 6), (2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: [s.pop("blocks.1.0.attn.proj.bias"), s.pop("head.bias")],
            r"got no stages\.1\.blocks\.0\.attention\.out\.bias, no head\.bias\.",
        ),
        (lambda s: s.update(extra=torch.zeros(1), more=torch.zeros(1)), "no others, got also extra, also more"),
        (
            lambda s: s.update({"blocks.0.0.norm1.weight": torch.zeros(5)}),
            r"blocks\.0\.0\.norm1\.weight of shape \(5,\)",
        ),
        (
            lambda s: s.update({"blocks.0.0.win_tokens": torch.zeros(1, 64, 1, 5)}),
            r"blocks\.0\.0\.win_tokens of shape \(1, 64, 1, 5\) in place of \(8, 8, 32\)",
        ),
        (
            lambda s: s.update({"blocks.0.0.win_tokens": torch.zeros(1, 63, 1, 32)}),
            r"blocks.0.0.win_tokens: expected tokens of square windows on a grid of 56 .*got shape \(1, 63, 1, 32\)",
        ),
        (lambda s: [s.pop(name) for name in [*s] if "embeds" in name], r"Is it a checkpoint of SepViT\?"),
    ],
)
def test_messages(change, message: str) -> None:
    state = official()
    change(state)
    with pytest.raises(InvalidArgument, match=message):
        read_sepvit(state)


def test_a_file_is_read_as_its_state_dict_is(tmp_path: Path) -> None:
    torch.save({"state_dict": official(), "epoch": 299}, tmp_path / "sepvit.pth")
    expected = read_sepvit(official()).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in read_sepvit(tmp_path / "sepvit.pth").state_dict().items()
    )
