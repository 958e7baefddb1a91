"""No layout of text and media lets a medium reach text that must not see it: such positions move by exactly 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.adapters.flamingo import Flamingo
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from tests.adapters.flamingo.hosts import MEDIA_TOKEN, flamingo, language_model, media, text

POLICIES = [LastMedium(), LastMedia(2), ConsecutiveGroup(), AllPrevious()]


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def model(request: pytest.FixtureRequest) -> Flamingo:
    return flamingo(language_model("llama", num_hidden_layers=2), attend=request.param, every=1)


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def lonely(request: pytest.FixtureRequest) -> Flamingo:
    """A language model whose tokens do not speak to each other: what is left is who reads a medium itself."""
    lm = language_model("llama", num_hidden_layers=2)
    for layer in lm.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return flamingo(lm, attend=request.param, every=1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[str], Tensor, Tensor]:
    """Rows of one length with padding on either side, and a mask with a real medium for each place."""
    length = draw(st.integers(4, 14))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left, right = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        inside = draw(
            st.lists(st.sampled_from("ab#c##d"), min_size=length - left - right, max_size=length - left - right)
        )
        rows.append("." * left + "".join(inside) + "." * right)
    slots = max(1, max(row.count("#") for row in rows)) + draw(st.integers(0, 1))
    mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    for row, content in enumerate(rows):
        places = draw(st.permutations(range(slots)))[: content.count("#")]
        mask[row, sorted(places)] = True
    return rows, text(*rows), mask


class Moved:
    """Which logits move, by however little, when one medium of a batch does."""

    def __init__(self, model: Flamingo, tokens: Tensor, images: Tensor, **kwargs: Tensor) -> None:
        self.model, self.tokens, self.images, self.kwargs = model, tokens, images, kwargs
        self.before = self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(self.tokens, media=images, use_cache=False, **self.kwargs).logits

    def by(self, row: int, medium: int) -> Tensor:
        changed = self.images.clone()
        changed[row, medium] = torch.randn_like(changed[row, medium])
        return (self.before != self.logits(changed)).any(-1)


@settings(derandomize=True, max_examples=10, deadline=None)
@given(batches())
def test_text_before_a_medium_and_in_other_rows_does_not_move(
    model: Flamingo, batch: tuple[list[str], Tensor, Tensor]
) -> None:
    rows, tokens, mask = batch
    change = Moved(model, tokens, media(*mask.shape), media_mask=mask, attention_mask=(tokens != 0).long())
    for row, medium in torch.ones_like(mask).nonzero().tolist():
        moved = change.by(row, medium)
        if not mask[row, medium]:
            assert not moved.any()
            continue
        number = int(mask[row, : medium + 1].sum())
        place = [p for p, letter in enumerate(rows[row]) if letter == "#"][number - 1]
        assert moved[row, place]
        assert not moved[row, :place].any()
        moved[row] = False
        assert not moved.any()


@settings(derandomize=True, max_examples=10, deadline=None)
@given(batches())
def test_only_the_text_that_a_policy_allows_reads_a_medium(
    lonely: Flamingo, batch: tuple[list[str], Tensor, Tensor]
) -> None:
    _, tokens, mask = batch
    change = Moved(lonely, tokens, media(*mask.shape), media_mask=mask, attention_mask=(tokens != 0).long())
    attend: Attend = lonely.attend
    for row, medium in mask.nonzero().tolist():
        moved = change.by(row, medium)
        number = int(mask[row, : medium + 1].sum())
        allowed = torch.zeros_like(moved)
        allowed[row] = attend.visible(tokens == MEDIA_TOKEN).media(mask.shape[1])[row, :, number - 1]
        assert torch.equal(moved, allowed)


def test_packed_documents_see_their_own_media_only(model: Flamingo) -> None:
    packed, images = text("ab#cd##ef#gh#"), media(1, 5)
    documents = [slice(0, 6), slice(6, 9), slice(9, 13)]
    position_ids = torch.cat([torch.arange(part.stop - part.start) for part in documents])[None]
    with torch.no_grad():
        logits = model(packed, media=images, position_ids=position_ids, use_cache=False).logits
        begin = 0
        for part in documents:
            alone = packed[:, part]
            count = int((alone == MEDIA_TOKEN).sum())
            expected = model(alone, media=images[:, begin : begin + count], use_cache=False).logits
            assert (logits[:, part] - expected).abs().max() < 1e-5
            begin += count
    change = Moved(model, packed, images, position_ids=position_ids)
    for medium in range(5):
        moved = change.by(0, medium)[0]
        place = int((packed[0] == MEDIA_TOKEN).nonzero()[medium])
        own = next(part for part in documents if part.start <= place < part.stop)
        assert not moved[:place].any()
        assert moved[place : own.stop].all()
        assert not moved[own.stop :].any()
