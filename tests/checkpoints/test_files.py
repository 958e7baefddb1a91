"""Weights are read from files that hold weights and nothing else."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.checkpoints.files import Renamed, count_numbered, fill, find_weights, fit_weights, read_weights
from narrows.errors import InvalidArgument
from narrows.weights import read_file


def test_checkpoints_hold_weights_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"checkpoint: expected a file with weights, got .*which does not exist"):
        read_weights(tmp_path / "missing.pth")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(InvalidArgument, match="weights_only=True"):
        read_weights(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InvalidArgument, match="expected tensors by name"):
        read_weights(tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(InvalidArgument, match="expected safetensors"):
        read_weights(tmp_path / "text.safetensors")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "wrapped.pth")
    assert list(read_weights(tmp_path / "wrapped.pth")) == ["a"]
    with pytest.raises(InvalidArgument, match="which is a folder"):
        read_weights(tmp_path)
    torch.save({"model_state_dict": {"b": torch.ones(1)}, "epoch": 3}, tmp_path / "training.pth")
    assert list(read_weights(tmp_path / "training.pth")) == ["b"]


def test_weights_are_put_into_a_module_all_or_none() -> None:
    linear = nn.Linear(2, 3)
    before = linear.weight.clone()
    given = {"theirs.w": torch.ones(3, 4), "theirs.bias": torch.ones(3), "other": torch.ones(1)}
    weights = Renamed(given, [(r"^theirs\.w$", "weight")], argument="state")
    message = (
        "state: expected the parameters of a Linear, all of them and no others, got no bias, "
        r"theirs\.w of shape \(3, 4\) in place of \(3, 2\), also theirs\.bias, also other"
    )
    with pytest.raises(InvalidArgument, match=message):
        fill(linear, weights)
    assert torch.equal(linear.weight, before)


def test_weights_keep_their_dtype_and_are_copied() -> None:
    given = {"weight": torch.ones(3, 2, dtype=torch.bfloat16), "bias": torch.ones(3)}
    linear = nn.Linear(2, 3)
    fill(linear, Renamed(given))
    assert (linear.weight.dtype, linear.bias.dtype, linear.weight.requires_grad) == (
        torch.bfloat16,
        torch.float32,
        True,
    )
    given["bias"].zero_()
    assert (linear.bias == 1).all()


def test_two_weights_for_one_name_must_be_the_same() -> None:
    given = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}
    rules = [(r"^[ab]\.", "")]
    assert list(Renamed(given, rules)) == ["weight"]
    given["b.weight"] = torch.zeros(2)
    with pytest.raises(InvalidArgument, match=r"one weight for weight, got 'a\.weight' and 'b\.weight', which differ"):
        Renamed(given, rules)


def test_names_lead_back_to_the_checkpoint() -> None:
    first = Renamed({"x.0.a": torch.ones(1), "x.1.a": torch.ones(1), "y": torch.ones(1)}, [(r"^x\.", "layers.")])
    second = Renamed(first.under("layers.1."), [("a", "weight")])
    assert second.names == {"weight": "x.1.a"}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "norm": nn.LayerNorm(2)})


def prefixed(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in network(seed).state_dict().items()}


OTHER = torch.zeros(3)
LYING_ABOUT: dict[str, tuple[Any, str | None]] = {
    "a state dict": (prefixed(""), None),
    "a training script": ({"model": prefixed(""), "args": Namespace(lr=1), "epoch": 3}, None),
    "DataParallel": (prefixed("module."), None),
    "torch.compile": ({"model": prefixed("_orig_mod.")}, None),
    "DDP of a compiled model": ({"state_dict": prefixed("module._orig_mod.")}, None),
    "Lightning": ({"state_dict": {**prefixed("model."), "loss.weight": OTHER}, "loops": {}}, None),
    "Lightning, compiled": ({"state_dict": prefixed("model._orig_mod."), "hyper_parameters": {"lr": 1}}, None),
    "timm, with an average": ({"state_dict": prefixed(""), "state_dict_ema": prefixed("", 1)}, None),
    "timm, the average": ({"state_dict": prefixed("", 1), "state_dict_ema": prefixed("")}, "state_dict_ema"),
    "ConvNeXt": ({"model": prefixed(""), "model_ema": prefixed("", 1), "scaler": {"scale": 1.0}}, None),
    "ConvNeXt, the average": ({"model": prefixed("", 1), "model_ema": prefixed("")}, "model_ema"),
    "AveragedModel": (prefixed("module.") | {"n_averaged": torch.tensor(3)}, None),
    "DINO": (
        {"student": prefixed("module.backbone.", 1), "teacher": prefixed("backbone.") | {"head.mlp.weight": OTHER}},
        None,
    ),
    "DINO, the student": ({"student": prefixed("module.backbone."), "teacher": prefixed("backbone.", 1)}, "student"),
    "DINOv2": ({"teacher": prefixed("backbone.") | {"dino_head.mlp.weight": OTHER}}, None),
    "I-JEPA": ({"encoder": prefixed("module."), "target_encoder": prefixed("module.", 1)}, None),
    "MoCo v2": ({"state_dict": {**prefixed("module.encoder_q."), **prefixed("module.encoder_k.", 1)}}, None),
    "MoCo v3": ({"state_dict": prefixed("module.base_encoder.") | prefixed("module.momentum_encoder.", 1)}, None),
    "MoCo v3, momentum": (
        {"state_dict": prefixed("module.base_encoder.", 1) | prefixed("module.momentum_encoder.")},
        "module.momentum_encoder",
    ),
    "DeepSpeed": ({"module": prefixed(""), "optimizer": None, "ds_config": {"a": 1}}, None),
    "CLIP, a tower": (prefixed("visual.trunk.") | {"text.weight": OTHER, "logit_scale": torch.tensor(1.0)}, None),
    "an optimizer beside it": ({"net": prefixed(""), "optimizer": {"state": {0: {"exp_avg": OTHER}}}}, None),
}


@pytest.mark.parametrize("name", LYING_ABOUT)
def test_weights_are_found_where_training_scripts_leave_them(name: str, tmp_path: Path) -> None:
    content, key = LYING_ABOUT[name]
    torch.save(content, tmp_path / "checkpoint.pth")
    model = network(seed=5)
    weights, notes = find_weights(model, read_file(tmp_path / "checkpoint.pth"), key=key)
    fit_weights(weights, model.state_dict(), None)
    fill(model, weights)
    assert all(torch.equal(value, network().state_dict()[name]) for name, value in model.state_dict().items())
    several = name.startswith(("timm", "ConvNeXt", "DINO,", "I-JEPA", "MoCo")) or name == "DINO"
    assert any("checkpoint_key may name" in note for note in notes) == (several and key is None)


def test_weights_that_could_be_either_are_asked_for() -> None:
    both = {"first": prefixed(""), "second": prefixed("", 1)}
    with pytest.raises(InvalidArgument, match="checkpoint_key: expected one of 'first', 'second': all fit the model"):
        find_weights(network(), both)
    with pytest.raises(
        InvalidArgument, match=r"checkpoint_key: expected where weights are in .*'first', 'second', got"
    ):
        find_weights(network(), both, key="third")
    found, _ = find_weights(network(), both, key="second")
    assert torch.equal(found["norm.weight"], both["second"]["norm.weight"])
    with pytest.raises(InvalidArgument, match=r"checkpoint: expected the weights of a ModuleDict .*blocks\.0\.weight"):
        find_weights(network(), {"other": OTHER})
    with pytest.raises(InvalidArgument, match="expected tensors by name, got none"):
        find_weights(network(), {"epoch": 3})


def test_numbers_count_from_zero_without_a_gap() -> None:
    pattern = r"^blocks\.(\d+)\."
    assert count_numbered(["blocks.0.a", "blocks.1.a", "blocks.0.b", "x"], pattern) == 2
    for far in ("2", "9" * 5000, "00"):
        with pytest.raises(InvalidArgument, match="numbered from 0 to 1, got numbers up to"):
            count_numbered(["blocks.0.a", f"blocks.{far}.a"], pattern)


@pytest.mark.parametrize(("prefix", "name"), [(1, "pos_embed"), (0, "embed.position_embeddings"), (5, "positions")])
def test_positions_of_another_grid_are_interpolated_as_timm_does(prefix: int, name: str) -> None:
    from timm.layers import resample_abs_pos_embed

    given = torch.randn(1, prefix + 36, 8)
    weights = Renamed({name: given.bfloat16().float(), "mask_token": OTHER})
    notes = fit_weights(weights, {name: torch.zeros(1, prefix + 6, 8)}, (2, 3))
    assert notes[0] == "Positions of a grid of 6 x 6 are interpolated to 2 x 3"
    assert "mask_token" in notes[1]
    expected = resample_abs_pos_embed(given.bfloat16().float(), [2, 3], [6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(weights[name], expected)
    assert list(weights) == [name]


@pytest.mark.parametrize(
    ("name", "given", "own"),
    [
        ("pos_embed", (1, 38, 8), (1, 7, 8)),  # no square beside one prefix token
        ("pos_embed", (1, 37, 4), (1, 7, 8)),  # another width
        ("pos_embed", (37, 8), (1, 7, 8)),
        ("blocks.0.weight", (1, 37, 8), (1, 7, 8)),
        ("relative_position_bias_table", (36, 8), (6, 8)),
    ],
)
def test_nothing_else_is_made_to_fit(name: str, given: tuple[int, ...], own: tuple[int, ...]) -> None:
    weights = Renamed({name: torch.randn(given), "register_tokens": OTHER})
    assert fit_weights(weights, {name: torch.zeros(own)}, (2, 3)) == []
    assert weights[name].shape == given
    assert "register_tokens" in weights
