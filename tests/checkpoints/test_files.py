"""Weights are read from files that hold weights and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from narrows.checkpoints.files import Renamed, fill, read_weights
from narrows.errors import InvalidArgument


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
