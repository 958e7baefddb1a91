"""Which text reads which medium: what narrows promises, and where upstream breaks it."""

import pytest
import torch
from accelerate import cpu_offload
from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention as UpstreamAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from narrows.ops.media_attention import (
    AllPrevious,
    Attend,
    ConsecutiveGroup,
    LastMedia,
    LastMedium,
    VisibleMedia,
)
from tests.support import assert_close, gradients

IMPLS = ("reference", "fused", "segmented")
both_policies = pytest.mark.parametrize("attend", [LastMedium(), AllPrevious()], ids=["last", "previous"])
POLICIES = [LastMedium(), LastMedia(2), ConsecutiveGroup(), AllPrevious()]
every_policy = pytest.mark.parametrize("attend", POLICIES, ids=str)


def attention(**kwargs: object) -> nn.Module:
    return MaskedCrossAttention(16, heads=2, head_dim=4, **kwargs).double()


def opened(block: nn.Module) -> nn.Module:
    nn.init.constant_(block.attn_gate, 0.8)
    nn.init.constant_(block.ff_gate, -0.5)
    return block


def gated(**kwargs: object) -> GatedCrossAttentionBlock:
    return opened(GatedCrossAttentionBlock(16, heads=2, head_dim=4, **kwargs)).double()


def draw(media: int = 3, text: int = 9, batch: int = 1) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, *shape, 16, dtype=torch.float64) for shape in ((text,), (media, 4)))


def places(*positions: int, length: int = 9) -> Tensor:
    locations = torch.zeros(1, length, dtype=torch.bool)
    locations[0, list(positions)] = True
    return locations


def upstream(**kwargs: object) -> nn.Module:
    return UpstreamAttention(dim=16, heads=2, dim_head=4, **kwargs).double()


def moved(module: nn.Module, text: Tensor, media: Tensor, locations: Tensor, medium: int) -> Tensor:
    """Which text positions change, by however little, when a medium does."""
    changed = media.clone()
    changed[:, medium] += torch.randn_like(changed[:, medium])
    return (module(text, media, locations) != module(text, changed, locations)).any(-1)


@pytest.mark.parametrize("impl", IMPLS)
def test_text_reads_its_last_medium_as_if_there_were_no_other(impl: str) -> None:
    module, (text, media) = attention(impl=impl), draw()
    output = module(text, media, places(2, 4, 5))
    assert (output[:, :2] == 0).all()
    for medium, span in enumerate([slice(2, 4), slice(4, 5), slice(5, 9)]):
        assert_close(output[:, span], module_without_locations(module)(text, media[:, medium : medium + 1])[:, span])


def module_without_locations(module: nn.Module) -> nn.Module:
    plain = attention()
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_text_reads_all_media_before_it_and_none_after(impl: str) -> None:
    module, (text, media) = attention(impl=impl, attend=AllPrevious()), draw()
    output = module(text, media, places(2, 4, 5))
    assert (output[:, :2] == 0).all()
    for count, span in enumerate([slice(2, 4), slice(4, 5), slice(5, 9)], start=1):
        assert_close(output[:, span], module(text, media[:, :count])[:, span], 1e-12)


def test_defect_3_text_before_any_medium_reads_nothing_when_all_previous_are_seen() -> None:
    """Upstream: a uniform average over all media, future ones included."""
    theirs, (text, media) = upstream(only_attend_immediate_media=False), draw()
    locations = places(2, 4, 5)
    ours = from_upstream(theirs)
    assert moved(theirs, text, media, locations, 2)[0, :2].all()
    assert moved(ours, text, media, locations, 2)[0].tolist() == 5 * [False] + 4 * [True]
    assert (ours(text, media, locations)[:, :2] == 0).all()
    assert_close(ours(text, media, locations)[:, 2:], theirs(text, media, locations)[:, 2:], 1e-12)


def test_defect_4_text_after_a_medium_that_was_not_given_reads_nothing() -> None:
    """Upstream: more media tokens than media give the average over all media, without an error."""
    theirs, (text, media) = upstream(), draw(media=2)
    locations = places(0, 3, 6)
    ours = from_upstream(theirs)
    average = theirs.to_out(theirs.to_kv(media.flatten(1, 2)).chunk(2, -1)[1].mean(1))
    assert_close(theirs(text, media, locations)[:, 6:], average[:, None].expand(1, 3, 16), 1e-12)
    assert (ours(text, media, locations)[:, 6:] == 0).all()
    assert not moved(ours, text, media, locations, 0)[0, 3:].any()
    assert_close(ours(text, media, locations)[:, :6], theirs(text, media, locations)[:, :6], 1e-12)


def test_more_locations_than_media_leave_all_previous_media_in_sight() -> None:
    module, (text, media) = attention(attend=AllPrevious()), draw(media=2)
    assert_close(module(text, media, places(0, 3, 6))[:, 6:], module(text, media)[:, 6:], 1e-12)


def test_defect_5_upstreams_own_example_reads_the_wrong_media_for_almost_all_text() -> None:
    """Random locations with two media, as in upstream's README: past the second location nothing is to be read."""
    theirs = UpstreamAttention(dim=16, heads=2, dim_head=4)
    text, media = torch.randn(1, 512, 16), torch.randn(1, 2, 4, 16)
    locations = torch.randint(0, 2, (1, 512)).bool()
    surplus = locations.cumsum(-1) > 2
    assert surplus.float().mean() > 0.9
    assert moved(theirs, text, media, locations, 0)[surplus].all()
    assert not moved(from_upstream(theirs), text, media, locations, 0)[surplus].any()


def test_defect_7_padded_media_take_no_part_without_locations() -> None:
    theirs, (text, media) = upstream(), draw(media=2)
    padded = torch.cat((media, torch.zeros(1, 1, 4, 16, dtype=torch.float64)), 1)
    ours = from_upstream(theirs)
    mask = torch.tensor([[True, True, False]])
    assert (theirs(text, padded) - theirs(text, media)).abs().max() > 1e-2
    assert_close(ours(text, padded, media_mask=mask), theirs(text, media), 1e-12)


def test_defect_14_media_may_have_a_width_of_their_own() -> None:
    block = opened(GatedCrossAttentionBlock(16, media_dim=6, heads=2, head_dim=4))
    text, media = torch.randn(1, 9, 16), torch.randn(1, 3, 4, 6)
    assert moved(block, text, media, places(2, 4, 5), 0)[0].tolist() == [False, False, True, True] + 5 * [False]


@both_policies
def test_defect_15_masked_media_do_not_poison_even_as_nan(attend: Attend) -> None:
    """Neither a closed gate nor a mask on scores stops NaN: 0 * NaN. Masked media are taken out before anything."""
    block = GatedCrossAttentionBlock(16, heads=2, head_dim=4, attend=attend).double()
    text, media = draw()
    locations, mask = places(2, 4, 5), torch.tensor([[True, False, True]])
    poisoned = media.clone()
    poisoned[:, 1] = torch.nan
    assert torch.equal(block(text, poisoned, locations, mask), text)
    opened(block)
    poisoned.requires_grad_()
    output = block(text, poisoned, locations, mask)
    assert_close(output, block(text, media, locations, mask), 1e-12)
    of_media, *of_parameters = gradients(output, poisoned, *block.parameters())
    assert (of_media[:, 1] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in of_parameters)


@pytest.mark.parametrize("impl", IMPLS)
def test_latents_may_be_masked_one_by_one(impl: str) -> None:
    module, (text, media) = attention(impl=impl), draw()
    mask = (torch.arange(4) < 3).expand(1, 3, 4)
    assert_close(module(text, media, places(0, 4), mask), module(text, media[:, :, :3], places(0, 4)), 1e-12)


@st.composite
def layouts(draw_from: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """Locations, a number of media from none to more than there are locations, and a mask of media padded anywhere."""
    length = draw_from(st.integers(1, 17))
    locations = torch.tensor([draw_from(st.lists(st.booleans(), min_size=length, max_size=length))])
    num_media = draw_from(st.integers(0, 5))
    mask = draw_from(st.lists(st.booleans(), min_size=num_media, max_size=num_media))
    return locations, num_media, torch.tensor([mask], dtype=torch.bool).view(1, num_media)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(layouts())
def test_no_layout_leaks(layout: tuple[Tensor, int, Tensor]) -> None:
    """Whatever the layout, the gradient of a text position reaches the media it may see and is 0 at all others."""
    locations, num_media, mask = layout
    text, media = draw(num_media, locations.shape[1])
    media.requires_grad_()
    for attend in POLICIES:
        output = attention(attend=attend)(text, media, locations, mask)
        shown = attend.visible(locations).media(num_media)[0]
        for position in range(locations.shape[1]):
            (gradient,) = torch.autograd.grad(output[0, position].sum(), media, retain_graph=True, allow_unused=True)
            reached = [] if gradient is None else [m for m in range(num_media) if (gradient[0, m] != 0).any()]
            seen = [m for m in range(num_media) if mask[0, m] and shown[position, m]]
            assert reached == seen
            assert seen or (output[0, position] == 0).all()


@both_policies
def test_a_closed_block_is_the_identity_and_its_gates_learn(attend: Attend) -> None:
    block = GatedCrossAttentionBlock(16, attend=attend)
    text, media = torch.randn(2, 9, 16), torch.randn(2, 3, 4, 16)
    output = block(text, media, places(2, 4, 5).expand(2, 9))
    assert torch.equal(output, text)
    assert all(gradient != 0 for gradient in gradients(output, block.attn_gate, block.ff_gate))


def test_an_open_block_is_the_figure_of_the_paper() -> None:
    block = opened(GatedCrossAttentionBlock(16, heads=2, head_dim=4, activation="squared_relu")).double()
    text, media = draw()
    y = text + block.attn_gate.tanh() * block.attn(text, media, places(2, 4))
    normed = nn.functional.layer_norm(y, (16,), block.ff[0].weight, block.ff[0].bias)
    hidden = (normed @ block.ff[1].weight.T).clamp(min=0) ** 2
    assert_close(block(text, media, places(2, 4)), y + block.ff_gate.tanh() * (hidden @ block.ff[3].weight.T), 1e-12)


@pytest.mark.parametrize("feed_forward_without_media", [True, False])
def test_the_attention_of_a_block_is_called_with_the_media_themselves(feed_forward_without_media: bool) -> None:
    """What wraps it, a hook or FSDP for instance, has everything inside one call: the projection of the media too."""
    block, (text, media) = gated(feed_forward_without_media=feed_forward_without_media), draw()
    mask, calls = torch.tensor([[True, False, True]]), []
    block.attn.register_forward_pre_hook(lambda module, args: calls.append(("attn", args[1])))
    block.attn.to_kv.register_forward_pre_hook(lambda module, args: calls.append(("to_kv", args[0])))
    block(text, media, places(2, 4, 5), mask)
    assert [name for name, _ in calls] == ["attn", "to_kv"]
    assert calls[0][1] is media


def test_resetting_closes_the_gates() -> None:
    block, (text, media) = gated(), draw()
    before = block.attn.to_q.weight.clone()
    block.reset_parameters()
    assert torch.equal(block(text, media), text)
    assert (block.attn.to_q.weight != before).any()


@every_policy
def test_media_projected_once_are_read_as_if_projected_each_time(attend: Attend) -> None:
    block, (text, media) = gated(attend=attend), draw()
    locations, mask = places(2, 4, 5), torch.tensor([[True, False, True]])
    kept = block.keys_values(media, mask)
    assert torch.equal(block(text, kept, locations), block(text, media, locations, mask))
    assert torch.equal(
        block.routing(text, kept, locations).weights, block.routing(text, media, locations, mask).weights
    )
    assert torch.equal(block(text, kept), block(text, media, media_mask=mask))


def test_an_offloaded_block_projects_media_outside_its_forward() -> None:
    block, (text, media) = gated(), draw()
    expected = block(text, media, places(2, 4, 5))
    cpu_offload(block, execution_device=torch.device("cpu"))
    assert block.attn.to_kv.weight.is_meta
    assert torch.equal(block(text, block.keys_values(media), places(2, 4, 5)), expected)


@every_policy
def test_a_part_of_the_text_reads_what_it_reads_in_the_whole(attend: Attend) -> None:
    block, (text, media) = gated(attend=attend), draw()
    whole, kept = block(text, media, places(2, 4, 5)), block.keys_values(media)
    visible = attend.visible(places(2, 4, 5))
    for position in range(9):
        part = block(text[:, position : position + 1], kept, visible=visible.rows(position, position + 1))
        assert_close(part, whole[:, position : position + 1], 1e-12)


def test_only_the_last_medium_has_to_be_kept() -> None:
    module, (text, media) = attention(), draw()
    whole, last = module(text, media, places(2, 4, 5)), module.keys_values(media[:, 2:])
    first = torch.ones(1, 4, dtype=torch.long)
    assert_close(module(text[:, 5:], last, visible=VisibleMedia(first, first, 1)), whole[:, 5:], 1e-12)


@pytest.mark.compiled
def test_a_decoded_token_is_one_graph() -> None:
    block, (text, media) = gated(), draw()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    first = torch.ones(1, 1, dtype=torch.long)
    kept, visible = block.keys_values(media[:, 2:]), VisibleMedia(first, first, 1)
    assert_close(compiled(text[:, 8:], kept, visible=visible), block(text, media, places(2, 4, 5))[:, 8:], 1e-12)


@every_policy
def test_packed_documents_read_what_each_reads_alone(attend: Attend) -> None:
    block = gated(attend=attend)
    (first, its), (second, theirs) = draw(2), draw(3)
    locations = [places(1, 8), places(0, 1, 5)]  # the first ends with a medium, the second begins with one
    alone = [block(first, its, locations[0]), block(second, theirs, locations[1])]
    visible = attend.visible(torch.cat(locations, 1), torch.arange(18)[None] % 9 == 0)
    packed = block(torch.cat((first, second), 1), torch.cat((its, theirs), 1), visible=visible)
    assert_close(packed, torch.cat(alone, 1), 1e-12)


@every_policy
def test_feed_forward_may_leave_text_without_media_alone(attend: Attend) -> None:
    block = opened(GatedCrossAttentionBlock(16, heads=2, head_dim=4, attend=attend)).double()
    sparing = GatedCrossAttentionBlock(
        16, heads=2, head_dim=4, attend=attend, feed_forward_without_media=False
    ).double()
    sparing.load_state_dict(block.state_dict())
    text, media = draw()
    mask = torch.tensor([[True, False, True]])
    output, other = sparing(text, media, places(2, 4, 6), mask), block(text, media, places(2, 4, 6), mask)
    reads = sparing.routing(text, media, places(2, 4, 6), mask).weights.sum((1, 2))[0] > 0
    assert 2 <= reads.sum() <= 7
    assert torch.equal(output[:, ~reads], text[:, ~reads])
    assert torch.equal(output[:, reads], other[:, reads])
    assert (other[:, ~reads] != text[:, ~reads]).any()
    assert torch.equal(sparing(text, media, media_mask=mask), block(text, media, media_mask=mask))
    assert torch.equal(sparing(text, media, media_mask=~mask | mask), block(text, media))
    assert torch.equal(sparing(text, media, media_mask=mask & ~mask), text)


@both_policies
def test_routing_says_which_media_a_token_reads(attend: Attend) -> None:
    module, (text, media) = attention(attend=attend), draw()
    routing = module.routing(text, media, places(2, 4, 5))
    assert (routing.carriers, routing.weights.shape) == ("media", (1, 2, 3, 9))
    assert_close(routing.weights.sum(2), torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 1]).double().expand(1, 2, 9), 1e-12)
    seen = (routing.weights > 0)[0, 0].T.int().tolist()
    last = 2 * [[0, 0, 0]] + 2 * [[1, 0, 0]] + [[0, 1, 0]] + 4 * [[0, 0, 1]]
    previous = 2 * [[0, 0, 0]] + 2 * [[1, 0, 0]] + [[1, 1, 0]] + 4 * [[1, 1, 1]]
    assert seen == (last if attend == LastMedium() else previous)
    block = GatedCrossAttentionBlock(16, heads=2, head_dim=4, attend=attend).double()
    block.attn.load_state_dict(module.state_dict())
    assert torch.equal(block.routing(text, media, places(2, 4, 5)).weights, routing.weights)


def test_what_is_wrong_is_said() -> None:
    module = MaskedCrossAttention(16, media_dim=12)
    with pytest.raises(InvalidArgument, match=r"text: expected shape \[B, T, D\] with D = 16, got shape \(1, 5, 12\)"):
        module(torch.randn(1, 5, 12), torch.randn(1, 2, 3, 12))
    with pytest.raises(InvalidArgument, match=r"media: expected shape \[B, M, N, D\] with D = 12"):
        module(torch.randn(1, 5, 16), torch.randn(1, 2, 3, 16))
    with pytest.raises(InvalidArgument, match=r"media_mask: expected shape \[B, M, N\] = \(1, 2, 3\)"):
        module(torch.randn(1, 5, 16), torch.randn(1, 2, 3, 12), media_mask=torch.ones(1, 2, 4, dtype=torch.bool))
    text, kept = torch.randn(1, 5, 16), module.keys_values(torch.randn(1, 2, 3, 12))
    locations = torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match="media_mask: expected None with keys and values"):
        module(text, kept, media_mask=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="visible: expected None with media_locations"):
        module(text, kept, locations, visible=LastMedium().visible(locations))
    for name in ("media_dim", "heads", "head_dim"):
        with pytest.raises(InvalidArgument, match=f"{name}: expected a positive integer, got 0"):
            GatedCrossAttentionBlock(16, **{name: 0})


@pytest.mark.compiled  # beartype would speak first
def test_a_policy_is_no_string() -> None:
    with pytest.raises(InvalidType, match=r"attend: expected a policy, LastMedium\(\) for instance, got 'last'"):
        MaskedCrossAttention(16, attend="last")


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_shape_or_a_type_is_said() -> None:
    module, text, media = MaskedCrossAttention(16), torch.randn(2, 5, 16), torch.randn(2, 2, 3, 16)
    with pytest.raises(InvalidArgument, match="media: expected the batch of text, 2, got"):
        module(text, media[:1])
    with pytest.raises(InvalidType, match="media_locations: expected a boolean tensor"):
        module(text, media, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"media_locations: expected shape \[B, T\] = \(2, 5\)"):
        module(text, media, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match=r"media_mask: expected shape \[B, M\] = \(2, 2\)"):
        module(text, media, media_mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("start", [0, 0.4])
def test_gates_start_where_they_are_told(start: float) -> None:
    block = GatedCrossAttentionBlock(16, heads=2, head_dim=4, gate_init=start)
    for _ in range(2):
        assert block.attn_gate.item() == block.ff_gate.item() == pytest.approx(start)
        opened(block).reset_parameters()


def test_gates_that_start_nowhere_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="gate_init: expected an integer or a finite number, got nan"):
        gated(gate_init=float("nan"))
