"""Weights are read from files that hold weights and nothing else."""

from pathlib import Path

import pytest
import torch

from narrows.checkpoints.files import read_weights
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
