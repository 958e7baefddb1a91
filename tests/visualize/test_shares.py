"""What a picture says about a routing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.routing import Routing
from narrows.visualize.shares import NOBODY, carried, keeps_tokens, neighbour_colours, owners


def test_the_owner_of_a_token_has_its_greatest_share_and_unread_tokens_have_none() -> None:
    maps = torch.tensor([[[0.2, 0.9], [0.0, 0.5]], [[0.7, 0.1], [0.0, 0.6]]])
    assert owners(maps).tolist() == [[1, 0], [NOBODY, 1]]


def test_what_a_carrier_carries_counts_every_read_token_once() -> None:
    # Softmax over tokens, as in a soft mixture of experts: rows sum to 1, so row sums alone say nothing.
    maps = torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]]])
    torch.testing.assert_close(carried(maps), torch.tensor([1.5 / 4, 1.5 / 4]))
    lopsided = torch.tensor([[[0.1, 0.1, 0.8, 0.0]], [[0.9, 0.1, 0.0, 0.0]]])
    torch.testing.assert_close(carried(lopsided), torch.tensor([(0.1 + 0.5 + 1) / 4, (0.9 + 0.5) / 4]))


def one_hot(*tokens: int | None, total: int = 7) -> torch.Tensor:
    weights = torch.zeros(1, 1, len(tokens), total)
    for carrier, token in enumerate(tokens):
        if token is not None:
            weights[0, 0, carrier, token] = 1
    return weights


def test_one_token_per_carrier_means_kept() -> None:
    assert keeps_tokens(Routing(one_hot(0, 3, None, 6), "kept tokens", (2, 3), prefix=1))
    mixed = one_hot(0, 3, 6)
    mixed[0, 0, 1, 4] = 0.1
    assert not keeps_tokens(Routing(mixed, "slots", (2, 3), prefix=1))


def test_heads_that_keep_different_tokens_mix_them() -> None:
    weights = torch.cat([one_hot(1, 2), one_hot(2, 3)], dim=1)
    assert not keeps_tokens(Routing(weights, "latents", (2, 3), prefix=1))


def test_one_mixing_sample_makes_the_batch_a_mixing_one() -> None:
    weights = torch.cat([one_hot(1, 2), one_hot(3, 4)])
    weights[1, 0, 0] = 1 / 7
    assert not keeps_tokens(Routing(weights, "slots", (2, 3), prefix=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_owners_that_touch_never_share_a_colour(height: int, width: int, carriers: int, seed: int) -> None:
    owner = torch.randint(NOBODY, carriers, (height, width), generator=torch.Generator().manual_seed(seed))
    colours = neighbour_colours(owner)
    assert set(colours) == set(owner.unique().tolist()) - {NOBODY}
    for i in range(height):
        for j in range(width):
            for k, m in ((i, j + 1), (i + 1, j), (i + 1, j + 1), (i + 1, j - 1)):
                if (
                    k < height
                    and 0 <= m < width
                    and owner[i, j] != owner[k, m]
                    and NOBODY not in (owner[i, j], owner[k, m])
                ):
                    assert colours[int(owner[i, j])] != colours[int(owner[k, m])]


def test_sixty_four_windows_need_four_colours() -> None:
    rows = torch.arange(8).repeat_interleave(7)
    owner = rows[:, None] * 8 + rows[None]
    assert set(neighbour_colours(owner).values()) == {0, 1, 2, 3}
