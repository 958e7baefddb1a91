"""Upstream's own models around upstream's layers: the same outputs and gradients once their layers are narrows'."""

from collections.abc import Callable
from typing import Any

import pytest
import slot_attention
import torch
from flamingo_pytorch import FlamingoPaLM
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.support import assert_close, gradients


def flat(output: Any) -> Tensor:
    """All results that gradients reach, as one vector, the masks beside them as numbers."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten().float() for part in parts])


def assert_same(theirs: nn.Module, ours: nn.Module, *args: Tensor, **kwargs: Any) -> None:
    """Outputs, and the gradients of the inputs and of every parameter that has the same name in both."""
    results = []
    for model in (theirs, ours):
        leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in args]
        inputs = [x for x in leaves if x.requires_grad]
        torch.manual_seed(5)
        output = flat(model(*leaves, **kwargs))
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = gradients(output, *inputs, *named.values())
        results.append((output, found[: len(inputs)], dict(zip(named, found[len(inputs) :], strict=True))))
    (their_output, their_inputs, their_named), (our_output, our_inputs, our_named) = results
    assert_close(our_output, their_output)
    for our, their in zip(our_inputs, their_inputs, strict=True):
        assert_close(our, their)
    for name in our_named.keys() & their_named.keys():
        assert_close(our_named[name], their_named[name])


def slots(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "MultiHeadSlotAttention":
        return slot_attention.MultiHeadSlotAttention(5, 16, heads=2, dim_head=8)
    return getattr(slot_attention, kind)(5, 16)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "AdaptiveSlotWrapper": lambda layer: slot_attention.AdaptiveSlotWrapper(layer, temperature=0.7),
    "MetaSlotAttention": lambda layer: slot_attention.MetaSlotAttention(layer, codebook_size=4),
    "OrthoSlotWrapper": slot_attention.OrthoSlotWrapper,
    "OrthoSlotWrapper of AdaptiveSlotWrapper": lambda layer: slot_attention.OrthoSlotWrapper(
        slot_attention.AdaptiveSlotWrapper(layer)
    ),
}


@pytest.mark.parametrize("num_slots", [None, 3])
@pytest.mark.parametrize("kind", ["SlotAttention", "MultiHeadSlotAttention"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_slot_attention(wrap: Callable[[nn.Module], nn.Module], kind: str, num_slots: int | None) -> None:
    theirs = wrap(slots(kind))
    ours = from_upstream(theirs)
    assert type(ours) is type(theirs)
    assert sum(isinstance(part, SlotAttention) for part in ours.modules()) == 1
    assert_same(theirs, ours, torch.randn(2, 9, 16), **({} if num_slots is None else {"num_slots": num_slots}))


def test_a_wrapper_of_the_two_way_form() -> None:
    theirs = slot_attention.OrthoSlotWrapper(slots("SlotAttentionExperimental"))
    ours = from_upstream(theirs)
    assert isinstance(ours.slot_attention, TwoWaySlotAttention)
    assert len(ours(torch.randn(2, 9, 16))) == 3
    assert_same(theirs, ours, torch.randn(2, 9, 16))


def test_a_converted_layer_goes_into_a_new_wrapper_of_upstream() -> None:
    """A wrapper reads `dim` of the layer, and may change how many slots and iterations there are."""
    layer = from_upstream(nn.Sequential(slots("SlotAttention")))[0]
    wrapper = slot_attention.AdaptiveSlotWrapper(layer)
    layer.num_slots, layer.iters = 4, 1
    found, keep = wrapper(torch.randn(2, 9, 16))
    assert (found.shape, keep.shape) == ((2, 4, 16), (2, 4))
    assert (layer.dim, layer.initial_slots.num_slots, layer.num_iterations) == (16, 4, 1)


class Encoder(nn.Module):
    """Images to tokens, as FlamingoPaLM wants its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)


@pytest.fixture
def palm() -> nn.Module:
    torch.manual_seed(0)
    model = FlamingoPaLM(
        dim=16, num_tokens=11, depth=3, dim_head=8, heads=2, cross_attn_every=2, img_encoder=Encoder(),
        perceiver_num_latents=3, max_video_frames=2,
    )  # fmt: skip
    for _, block in model.layers:
        if block is not None:
            nn.init.constant_(block.attn_gate, 0.8)
            nn.init.constant_(block.ff_gate, -0.6)
    return model


def test_a_flamingo_of_upstream(palm: nn.Module) -> None:
    ours = from_upstream(palm)
    assert isinstance(ours.perceiver_resampler, PerceiverResampler)
    assert [isinstance(block, GatedCrossAttentionBlock) for _, block in ours.layers] == [True, False, True]
    assert ours.to_logits[-1].weight is ours.token_emb.weight
    assert not any(parameter.requires_grad for parameter in ours.img_encoder.parameters())
    text = torch.tensor([[3, 5, 6, 3, 7, 8], [1, 3, 4, 5, 3, 9]])
    assert_same(palm, ours, text, images=torch.randn(2, 2, 3, 8, 8))
    assert_same(palm, ours, text, videos=torch.randn(2, 2, 2, 3, 8, 8))
    assert_same(palm, ours, text)
