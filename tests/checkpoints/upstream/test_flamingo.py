"""The same numbers as `flamingo_pytorch` wherever upstream is right, from the same weights."""

import pytest
import torch
from flamingo_pytorch import GatedCrossAttentionBlock as UpstreamBlock
from flamingo_pytorch import PerceiverResampler as UpstreamResampler
from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention as UpstreamAttention
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from tests.support import assert_close, gradients

# Upstream's names of the resampler's parameters, from ours.
NAMES = {"attn.": "0.", "ff.": "1.", "time_embeddings": "media_pos_emb"}


def theirs_named(name: str, ours: nn.Module) -> str:
    if isinstance(ours, PerceiverResampler):
        for here, there in NAMES.items():
            name = name.replace(here, there)
    return name


def assert_same(theirs: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], *rest: Tensor | None) -> None:
    """Outputs and the gradients of inputs and of every parameter agree to 1e-5."""
    runs = []
    for module in (theirs, ours):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = module(*leaves, *rest)
        if output.ndim == 4 and inputs[0].ndim == 3:
            output = output.squeeze(1)  # upstream's [B, 1, K, D] for one medium
        named = dict(module.named_parameters())
        grads = gradients(output, *leaves, *named.values())
        runs.append((output, grads[: len(leaves)], dict(zip(named, grads[len(leaves) :], strict=True))))
    (their_output, their_grads, their_parameters), (our_output, our_grads, our_parameters) = runs
    assert_close(our_output, their_output)
    for our, their in zip(our_grads, their_grads, strict=True):
        assert_close(our, their)
    assert len(our_parameters) == len(their_parameters)
    for name, gradient in our_parameters.items():
        their = their_parameters[theirs_named(name, ours)]
        assert_close(gradient, their.view_as(gradient))


def open_gates(block: nn.Module) -> nn.Module:
    nn.init.constant_(block.attn_gate, 0.9)
    nn.init.constant_(block.ff_gate, -0.7)
    return block


RESAMPLERS = {
    "defaults": {},
    "narrow heads": {"heads": 3, "dim_head": 5},
    "sizes": {"num_latents": 7, "num_media_embeds": 6, "ff_mult": 2, "depth": 3},
    "fractional ff_mult": {"ff_mult": 1.3},
}


@pytest.mark.parametrize("options", RESAMPLERS.values(), ids=RESAMPLERS)
@pytest.mark.parametrize("shape", [(2, 10, 24), (2, 1, 10, 24), (2, 4, 10, 24)], ids=["one", "one of many", "four"])
def test_perceiver_resampler(options: dict, shape: tuple[int, ...]) -> None:
    theirs = UpstreamResampler(**{"dim": 24, "depth": 2, **options})
    assert_same(theirs, from_upstream(theirs), (torch.randn(shape),))


def interleaved() -> Tensor:
    """Two rows with three media each, one of them with text before the first."""
    locations = torch.zeros(2, 13, dtype=torch.bool)
    locations[0, [2, 3, 9]] = True
    locations[1, [0, 5, 12]] = True
    return locations


ATTENTIONS = {"defaults": {}, "narrow heads": {"heads": 3, "dim_head": 5}}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("located", [True, False], ids=["located", "all media"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "previous"])
def test_masked_cross_attention(options: dict, located: bool, immediate: bool) -> None:
    theirs = UpstreamAttention(dim=24, only_attend_immediate_media=immediate, **options)
    # All previous media: upstream is right only where text starts with a medium.
    locations = interleaved()[slice(None) if immediate else slice(1, 2)] if located else None
    batch = 2 if locations is None else len(locations)
    inputs = (torch.randn(batch, 13, 24), torch.randn(batch, 3, 6, 24))
    assert_same(theirs, from_upstream(theirs), inputs, locations)


@pytest.mark.parametrize("options", [*ATTENTIONS.values(), {"ff_mult": 2}], ids=[*ATTENTIONS, "ff_mult"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "previous"])
def test_gated_cross_attention_block(options: dict, immediate: bool) -> None:
    theirs = open_gates(UpstreamBlock(dim=24, only_attend_immediate_media=immediate, **options))
    locations = interleaved()[slice(None) if immediate else slice(1, 2)]
    inputs = (torch.randn(len(locations), 13, 24), torch.randn(len(locations), 3, 6, 24))
    assert_same(theirs, from_upstream(theirs), inputs, locations)


def test_a_gated_block_has_upstreams_keys() -> None:
    """So that state dicts of upstream, OpenFlamingo and Otter load as they are."""
    ours, theirs = GatedCrossAttentionBlock(24).state_dict(), UpstreamBlock(dim=24).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}


def test_dtype_mode_and_independence_carry_over() -> None:
    theirs = UpstreamBlock(dim=24).to(torch.bfloat16).eval()
    ours = from_upstream(theirs)
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    nn.init.zeros_(ours.attn.to_q.weight)
    assert (theirs.attn.to_q.weight != 0).any()
