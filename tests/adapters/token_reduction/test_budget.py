"""How many tokens each block carries on."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from narrows.adapters.token_reduction.budget import FixedBudget, as_plain, count_of, schedule_of
from narrows.adapters.token_reduction.methods import METHODS
from narrows.errors import InvalidArgument


def counts(budget: FixedBudget, method: str, *, depth: int = 12, num_tokens: int = 196) -> list[int | None]:
    """What the schedule asks of each block."""
    schedule = schedule_of(budget, METHODS[method](), depth=depth, num_tokens=num_tokens)  # pyright: ignore
    return [None if entry is None else count_of(entry, num_tokens) for entry in schedule]


def test_one_number_holds_from_a_quarter_of_the_depth_on() -> None:
    for method in ("ats", "topk", "evit", "random"):
        assert counts(0.5, method) == [None] * 3 + [98] + [None] * 8
        assert counts(60, method) == [None] * 3 + [60] + [None] * 8
    assert counts(0.001, "topk") == [None] * 3 + [1] + [None] * 8


def test_with_the_whole_budget_ats_samples_in_every_block_from_there_on() -> None:
    for whole in (1.0, 196):
        assert counts(whole, "ats") == [None] * 3 + [196] * 9
        assert counts(whole, "topk") == [None] * 3 + [196] + [None] * 8


def test_a_method_that_removes_half_at_most_removes_as_much_in_every_block() -> None:
    assert counts(0.5, "tome") == [None] * 3 + [181, 168, 156, 144, 133, 123, 114, 106, 98]
    assert counts(0.35, "tome", depth=4) == [None, 138, 98, 69]
    assert counts(0.2, "tome", depth=4) == [None, 114, 67, 39]
    for count in range(1, 197):
        steps = [196, *(entry for entry in counts(count, "tome") if entry is not None)]
        assert steps[-1] == count
        assert all(2 * after >= before - 1 for before, after in pairwise(steps))
    with pytest.raises(InvalidArgument, match="in the 1 blocks from block 0 on"):
        counts(0.2, "tome", depth=1)


def test_schedules_are_taken_as_they_are() -> None:
    assert counts({3: 0.7, 6: 0.49, 9: 67}, "ats") == [
        None, None, None, 137, None, None, 96, None, None, 67, None, None
    ]  # fmt: skip
    assert counts([None, 0.5, 0.5, 10], "topk", depth=4) == [None, 98, 98, 10]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (torch.tensor(20), 20),
        (torch.tensor(0.5), 0.5),
        (np.int64(20), 20),
        (np.float64(0.5), 0.5),
        (np.array([9, 5]), [9, 5]),
        ([None, np.int32(9), torch.tensor(0.5)], [None, 9, 0.5]),
        (json.loads(json.dumps({3: 0.7, 6: 9})), {3: 0.7, 6: 9}),
        ({np.int64(3): 0.7}, {3: 0.7}),
    ],
)
def test_numbers_of_other_libraries_and_keys_of_json_are_numbers(given: Any, plain: Any) -> None:
    assert as_plain(given) == plain
    assert type(as_plain(given)) is type(plain)
