import torch
from torch import nn

from narrows.bench.agreement import disagreement
from narrows.bench.object_discovery import dinosaur
from narrows.bench.rows import rival_version


def test_both_sides_of_a_dinosaur_step_agree_and_a_difference_would_be_seen() -> None:
    contest = dinosaur(2, 3, hidden_dims=(16,)).prepare(torch.device("cpu"))
    assert rival_version(contest.rival).startswith("slot-attention 1.")
    assert not disagreement(contest)
    with torch.no_grad():
        nn.init.normal_(contest.rival.slots.to_v.weight)
    assert disagreement(contest)
