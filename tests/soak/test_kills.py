"""Kills at random moments leave nothing unreadable: a few of them here, 200 with `python -m tests.soak.kills`."""

import json

import torch

from narrows.files import UNFINISHED
from narrows.models import create_model
from tests.soak.kills import kill_saving, read_everything


def test_a_few_kills_of_saving_leave_a_whole_model(tmp_path):
    found = kill_saving(tmp_path, kills=3, seed=1)
    assert found.kills == 3
    assert found.early == 0
    assert found.unreadable == []


def test_what_cannot_be_read_is_found(tmp_path):
    create_model("vit_mini").save_pretrained(tmp_path / "model")
    torch.save({"global_step": 3}, tmp_path / "last.ckpt")
    (tmp_path / f"{UNFINISHED}x.ckpt").write_bytes(b"half")
    assert read_everything(tmp_path) == []
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:200])
    (tmp_path / "settings.json").write_text(json.dumps({"a": 1})[:-1])
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert len(read_everything(tmp_path)) == 3
