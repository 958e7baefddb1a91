"""The same numbers as `flamingo_pytorch`, OpenFlamingo and Otter wherever they are right, from the same weights."""

from typing import Any

import pytest
import torch
from flamingo_pytorch import GatedCrossAttentionBlock as UpstreamBlock
from flamingo_pytorch import PerceiverResampler as UpstreamResampler
from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention as UpstreamAttention
from safetensors.torch import load_file
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock
from narrows.layers.perceiver_resampler import PerceiverResampler
from tests.checkpoints.record_open_flamingo import LOCATIONS, RECORDED
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


def _named(package: str, name: str, **parts: Any) -> nn.Module:
    """A module of these parts whose class is named as the package names its own."""
    module = type(name, (nn.Module,), {"__module__": package})()
    for part, value in parts.items():
        setattr(module, part, value)
    return module


def _feed_forward(dim: int, hidden: int, kind: type[nn.Sequential] | type[nn.ModuleList]) -> nn.Module:
    layers = nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    return kind(*layers) if kind is nn.Sequential else kind(layers)


def _attention(package: str, dim: int, media_dim: int, **norms: nn.LayerNorm) -> nn.Module:
    return _named(
        package,
        "Attention",
        heads=2,
        scale=4**-0.5,
        **norms,
        to_q=nn.Linear(dim, 8, bias=False),
        to_kv=nn.Linear(media_dim, 16, bias=False),
        to_out=nn.Linear(8, dim, bias=False),
    )


def stand_in(recorded: dict[str, Tensor], name: str, *, immediate: bool = True) -> nn.Module:
    """A module built and named as OpenFlamingo or Otter builds it, with recorded weights; it cannot run."""
    otter = name.startswith("otter")
    package = "otter_ai.models.otter.modeling_otter" if otter else "open_flamingo.src.helpers"
    prefix, feed_forward = ("Otter", "feed_forward") if otter else ("", "ff")
    state = {key.removeprefix(f"{name}/"): value for key, value in recorded.items() if key.startswith(f"{name}/")}
    del state["output"]
    if "resampler" in name:
        layers = []
        for _ in range(2):
            block = _attention(package, 6, 6, norm_media=nn.LayerNorm(6), norm_latents=nn.LayerNorm(6))
            if otter:
                block.feed_forward = _feed_forward(6, 12, nn.ModuleList)
            layers.append(block if otter else nn.ModuleList([block, _feed_forward(6, 12, nn.Sequential)]))
        embeddings = {key: state.get(key) for key in ("latents", "frame_embs", "media_time_embs")}
        parameters = {key: None if value is None else nn.Parameter(value) for key, value in embeddings.items()}
        parts = {"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(6)}
        module = _named(package, f"{prefix}PerceiverResampler", **parameters, **parts)
    else:
        attention = _attention(package, 8, 6, norm=nn.LayerNorm(8))
        attention.only_attend_immediate_media = immediate
        gates = {gate: nn.Parameter(torch.zeros(1)) for gate in ("attn_gate", "ff_gate")}
        parts = {feed_forward: _feed_forward(8, 32, nn.ModuleList if otter else nn.Sequential)}
        module = _named(package, f"{prefix}GatedCrossAttentionBlock", attn=attention, **gates, **parts)
    module.load_state_dict(state)
    return module


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


@pytest.mark.parametrize("package", ["open_flamingo", "otter"])
@pytest.mark.parametrize("embeddings", ["", ".frames", ".media"], ids=["neither", "frames", "media"])
def test_resamplers_of_open_flamingo_and_otter(recorded: dict[str, Tensor], package: str, embeddings: str) -> None:
    name = f"{package}.resampler{embeddings}"
    for converted in (
        from_upstream(stand_in(recorded, name)),
        from_upstream(nn.Sequential(stand_in(recorded, name)))[0],
    ):
        assert_close(converted(recorded["clips"]), recorded[f"{name}/output"])
        # They have no embedding where neither is asked for: ours is zero, and stays so in training.
        assert converted.time_embeddings.requires_grad == bool(embeddings)


@pytest.mark.parametrize("name", ["open_flamingo.block", "otter.block", "open_flamingo.block.previous"])
def test_gated_blocks_of_open_flamingo_and_otter(recorded: dict[str, Tensor], name: str) -> None:
    module = stand_in(recorded, name, immediate="previous" not in name)
    inputs = recorded["text"], recorded["latents"], recorded["locations"]
    # All previous media: text before the first reads a mean of all media there, future ones included.
    rows = slice(1, 2) if "previous" in name else slice(None)
    for converted in (from_upstream(module), from_upstream(nn.Sequential(module))[0]):
        assert_close(converted(*inputs)[rows], recorded[f"{name}/output"][rows])


def test_both_kinds_of_embeddings_are_refused(recorded: dict[str, Tensor]) -> None:
    module = stand_in(recorded, "otter.resampler.media")
    module.frame_embs = nn.Parameter(torch.zeros(2, 6))
    with pytest.raises(InvalidArgument, match="module: expected frame_embs or media_time_embs or neither, got both"):
        from_upstream(module)


def test_cached_media_are_seen_by_text_that_follows_them(recorded: dict[str, Tensor]) -> None:
    """As OpenFlamingo decodes: the locations of the whole text, and only the tokens after it."""
    for immediate, name in [(True, "open_flamingo.block"), (False, "open_flamingo.block.previous")]:
        block = from_upstream(nn.Sequential(stand_in(recorded, name, immediate=immediate)))[0]
        text, latents = recorded["text"], recorded["latents"]
        whole = block(text, latents, media_locations=LOCATIONS)
        later = block(text[:, 8:], latents, media_locations=LOCATIONS[:, :8], use_cached_media=True)
        assert_close(later, whole[:, 8:])


def test_text_that_reads_the_next_medium_reads_as_if_all_were_reversed(recorded: dict[str, Tensor]) -> None:
    """Otter's `attend_previous=False`."""
    block = from_upstream(nn.Sequential(stand_in(recorded, "otter.block")))[0]
    text, latents = recorded["text"], recorded["latents"]
    reversed_output = block(text.flip(1), latents.flip(1), media_locations=LOCATIONS.flip(1))
    output = block(text, latents, media_locations=LOCATIONS, attend_previous=False)
    assert_close(output, reversed_output.flip(1))
