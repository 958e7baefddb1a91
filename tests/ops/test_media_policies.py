"""What text may see, against the definition of each policy, one token at a time."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import InvalidArgument
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium, VisibleMedia

POLICIES = [LastMedium(), LastMedia(1), LastMedia(2), LastMedia(3), ConsecutiveGroup(), AllPrevious()]


def by_definition(attend: Attend, locations: list[bool], starts: list[bool], position: int) -> set[int]:
    """The numbers of the media that a token sees: of those of its document up to it, what the policy takes."""
    begin = max([p for p in range(position + 1) if starts[p]], default=0)
    places = [p for p in range(begin, position + 1) if locations[p]]
    if isinstance(attend, LastMedium):
        places = places[-1:]
    elif isinstance(attend, LastMedia):
        places = places[-attend.count :]
    elif isinstance(attend, ConsecutiveGroup):
        gaps = [after for before, after in pairwise(places) if after > before + 1]
        places = [place for place in places if place >= max(gaps, default=0)]
    return {sum(locations[: place + 1]) for place in places}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.booleans())
def test_each_policy_shows_what_it_says(tokens: list[tuple[bool, bool]], packed: bool) -> None:
    locations, starts = [token[0] for token in tokens], [token[1] and packed for token in tokens]
    for attend in POLICIES:
        visible = attend.visible(torch.tensor([locations]), torch.tensor([starts]) if packed else None)
        shown = visible.media(sum(locations))[0]
        for position, row in enumerate(shown):
            assert set((row.nonzero().flatten() + 1).tolist()) == by_definition(attend, locations, starts, position)
        assert attend.most is None or int(shown.sum(-1).max()) <= attend.most
        assert visible.most == attend.most
        assert torch.equal(visible.any(sum(locations))[0], shown.any(-1))


def test_a_token_in_the_middle_of_a_group_sees_the_part_before_it() -> None:
    locations = torch.tensor([[True, True, False, True, True, True, False]])
    visible = ConsecutiveGroup().visible(locations)
    assert visible.first.tolist() == [[1, 1, 1, 3, 3, 3, 3]]
    assert visible.last.tolist() == [[1, 2, 2, 3, 4, 5, 5]]


def test_policies_are_values() -> None:
    assert LastMedia(2) == LastMedia(2) != LastMedia(3)
    assert LastMedium() != AllPrevious()
    with pytest.raises(InvalidArgument, match="count: expected a positive integer, got 0"):
        LastMedia(0)


def test_any_counts_what_is_there() -> None:
    """Numbers beyond the media and media without a real latent are seen by nobody."""
    visible = VisibleMedia(torch.tensor([[0, 1, 2, 3, 2]]), torch.tensor([[0, 1, 2, 4, 1]]))
    assert visible.any(4).tolist() == [[False, True, True, True, False]]
    assert visible.any(2).tolist() == [[False, True, True, False, False]]
    mask = torch.tensor([[[False, True], [False, False]]])
    assert visible.any(2, mask).tolist() == [[False, True, False, False, False]]
