"""What a GPU is asked for: exact counts, so that one launch more is seen in review, and nothing that makes it wait."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flamingo_pytorch
import pytest
import slot_attention
import soft_moe_pytorch
import timm
import torch
from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from vit_pytorch import ats_vit, sep_vit

from narrows import (
    GatedCrossAttentionBlock,
    PerceiverResampler,
    create_model,
    from_upstream,
    list_models,
    reduce_tokens,
)
from narrows import MaskedCrossAttention as OurCrossAttention
from narrows.layers.gated_cross_attention import MediaKeysValues
from narrows.ops.media_attention import VisibleMedia
from tests.cases import LayerCase
from tests.launches import Call, launches
from tests.layers.every_layer import every_implementation, every_layer
from tests.layers.every_layer import inputs as inputs_of

# Shape checks would take as long again, and nothing is computed.
pytestmark = pytest.mark.compiled

Make = Callable[[], nn.Module]


class Row(NamedTuple):
    """A usual call in bfloat16 and the launches of its forward pass.

    Args:
        rival: makes what people have today.
        call: runs either.
        launches: of ours.
        rival_launches: of theirs; None where it waits for the GPU, and cannot be counted.
        ours: makes ours; by default it is theirs, translated.
        dtype: of parameters; `call` makes its inputs in it.
    """

    rival: Make
    call: Call
    launches: int
    rival_launches: int | None
    ours: Make | None = None
    dtype: torch.dtype = torch.bfloat16


def on(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    """Calls a module on one tensor of that shape."""
    return lambda module, device: module(torch.empty(shape, device=device, dtype=dtype))


def reads_its_last_medium(module: nn.Module, device: torch.device) -> Tensor:
    text = torch.empty(4, 2048, 2048, device=device, dtype=torch.bfloat16)
    media = torch.empty(4, 32, 64, 2048, device=device, dtype=torch.bfloat16)
    locations = (torch.arange(2048, device=device) % 64 == 0).expand(4, -1)
    return module(text, media, media_locations=locations)


def hooked_slot_attention() -> nn.Module:
    """What no kernel may take: its modules are called, as LoRA, hooks and quantised weights need it."""
    layer = from_upstream(slot_attention.SlotAttention(7, 256))
    layer.mlp.register_forward_hook(lambda *_: None)
    return layer


def ats_classifier() -> nn.Module:
    return ats_vit.ViT(
        image_size=224,
        patch_size=16,
        num_classes=10,
        dim=384,
        depth=6,
        max_tokens_per_depth=(196, 196, 98, 98, 49, 49),
        heads=6,
        mlp_dim=1536,
    )


def timm_model(name: str) -> nn.Module:
    return timm.create_model(name).eval()


def deit() -> nn.Module:
    return timm_model("deit_small_patch16_224")


def reduced(method: str) -> nn.Module:
    model = deit()
    reduce_tokens(model, method=method, budget={3: 0.7, 6: 0.49, 9: 0.34}, execution="static")
    return model


TABLE = {
    # One of them stands for seven kernels, two an iteration and one before; in the two-way form for 13, and three that
    # sum what is read of each slot: tests/layers/interpreted_slot_attention.py, tests/ops/interpreted_two_way.py.
    "SlotAttention, 7 slots": Row(lambda: slot_attention.SlotAttention(7, 256), on(64, 1369, 256), 7, 61),
    "SlotAttention, 16 slots": Row(lambda: slot_attention.SlotAttention(16, 256), on(64, 4096, 256), 7, 61),
    "SlotAttention, float32": Row(
        lambda: slot_attention.SlotAttention(7, 256),
        on(64, 1369, 256, dtype=torch.float32),
        6,
        61,
        dtype=torch.float32,
    ),
    "SlotAttention, hooks": Row(
        lambda: slot_attention.SlotAttention(7, 256), on(64, 1369, 256), 66, 61, ours=hooked_slot_attention
    ),
    "TwoWaySlotAttention": Row(lambda: slot_attention.SlotAttentionExperimental(16, 256), on(16, 4096, 256), 7, 143),
    "TwoWaySlotAttention, float32": Row(
        lambda: slot_attention.SlotAttentionExperimental(16, 256),
        on(16, 4096, 256, dtype=torch.float32),
        159,
        143,
        dtype=torch.float32,
    ),
    "PerceiverResampler": Row(
        lambda: flamingo_pytorch.PerceiverResampler(dim=1024, depth=6), on(16, 4, 256, 1024), 87, 134
    ),
    "MaskedCrossAttention": Row(lambda: MaskedCrossAttention(dim=2048), reads_its_last_medium, 18, 26),
    "DynamicSlotsSoftMoE": Row(
        lambda: soft_moe_pytorch.DynamicSlotsSoftMoE(384, num_experts=28), on(64, 196, 384), 22, 160
    ),
    "SoftMoE": Row(lambda: soft_moe_pytorch.SoftMoE(768, num_experts=128, num_slots=2), on(64, 256, 768), 20, 657),
    "ATSViT": Row(ats_classifier, on(128, 3, 224, 224), 204, None),
    "UpstreamSepViT": Row(
        lambda: sep_vit.SepViT(num_classes=1000, dim=96, depth=(1, 2, 6, 2), heads=(3, 6, 12, 24)),
        on(64, 3, 224, 224),
        244,
        470,
    ),
    "sepvit_tiny": Row(
        lambda: timm_model("swin_tiny_patch4_window7_224"),
        on(128, 3, 224, 224),
        220,
        304,
        lambda: create_model("sepvit_tiny", device="meta").eval(),
    ),
    "topk": Row(deit, on(256, 3, 224, 224), 173, 137, lambda: reduced("topk")),
    "evit": Row(deit, on(256, 3, 224, 224), 188, 137, lambda: reduced("evit")),
    "tome": Row(deit, on(256, 3, 224, 224), 202, 137, lambda: reduced("tome")),
    "ats": Row(deit, on(256, 3, 224, 224), 193, 137, lambda: reduced("ats")),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_a_usual_call_launches_as_much_as_the_table_says(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(make: Make) -> int | None:
        try:
            found = launches(make, row.call, dtype=row.dtype)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        return None if found.copies or found.waits else found.total

    def rival() -> nn.Module:
        with torch.device("meta"):
            return row.rival().eval()

    ours = row.ours or (lambda: from_upstream(rival()))
    # Fake parameters cannot be moved to where they are, as upstream's experts are in each call.
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    assert (count(ours), count(rival)) == (row.launches, row.rival_launches)


@pytest.mark.parametrize(
    ("rival", "shape", "dtype", "ours", "theirs"),
    [
        (lambda: slot_attention.SlotAttention(7, 256), (64, 1369, 256), torch.bfloat16, 25, 220),
        (lambda: slot_attention.SlotAttention(7, 256), (64, 1369, 256), torch.float32, 21, 220),
        (lambda: slot_attention.SlotAttentionExperimental(16, 256), (16, 4096, 256), torch.bfloat16, 34, 568),
    ],
    ids=["one way", "one way, float32", "two ways"],
)
def test_a_training_step_of_slot_attention_launches_a_tenth_of_upstreams(
    rival: Make, shape: tuple[int, ...], dtype: torch.dtype, ours: int, theirs: int
) -> None:
    """Two of them stand for many kernels: `interpreted_slot_attention.py`, `interpreted_two_way.py`."""

    def call(module: nn.Module, device: torch.device) -> Any:
        return module(torch.empty(shape, device=device, dtype=dtype, requires_grad=True))

    makes = lambda: from_upstream(rival()), rival
    found = [launches(make, call, dtype=dtype, backward=True, nested=False) for make in makes]
    assert [(count.copies, count.waits) for count in found] == [([], [])] * 2
    assert [count.total for count in found] == [ours, theirs]


def text_and_media(*masks: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, locations: bool = True) -> Call:
    """Calls masked attention on 2048 tokens and 32 media, with masks of these shapes."""

    def call(module: nn.Module, device: torch.device) -> Tensor:
        text = torch.empty(4, 2048, 1024, device=device, dtype=dtype, requires_grad=True)
        media = torch.empty(4, 32, 64, 1024, device=device, dtype=dtype, requires_grad=True)
        places = torch.zeros(4, 2048, device=device, dtype=torch.bool) if locations else None
        return module(text, media, places, *(torch.ones(mask, device=device, dtype=torch.bool) for mask in masks))

    return call


def decodes(module: nn.Module, device: torch.device) -> Tensor:
    """One token behind a medium that was projected before."""
    kept = [torch.empty(4, 1, 64, 8, 64, device=device, dtype=torch.bfloat16) for _ in range(2)]
    number = torch.ones(4, 1, device=device, dtype=torch.long)
    text = torch.empty(4, 1, 1024, device=device, dtype=torch.bfloat16)
    return module(text, MediaKeysValues(*kept), visible=VisibleMedia(number, number, 1))


def resampled(*shape: int, masked: bool = False) -> Call:
    def call(module: nn.Module, device: torch.device) -> Tensor:
        media = torch.empty(*shape, 1024, device=device, dtype=torch.bfloat16)
        return module(media, torch.ones(shape, device=device, dtype=torch.bool) if masked else None)

    return call


ATTENTION, BLOCK = partial(OurCrossAttention, 1024), partial(GatedCrossAttentionBlock, 1024)
RESAMPLER = partial(PerceiverResampler, 1024, depth=6)
FLAMINGO = {
    "attention": (ATTENTION, text_and_media(), 16, 28),
    "attention, float32": (ATTENTION, text_and_media(dtype=torch.float32), 26, 56),
    "attention, masked media": (ATTENTION, text_and_media((4, 32)), 22, 37),
    "attention, masked latents": (ATTENTION, text_and_media((4, 32, 64)), 31, 50),
    "attention to all media": (ATTENTION, text_and_media(locations=False), 6, 22),
    "block": (BLOCK, text_and_media(), 26, 54),
    "block, one token": (BLOCK, decodes, 18, 48),
    "resampler": (RESAMPLER, resampled(16, 4, 256), 87, 233),
    "resampler, masked": (RESAMPLER, resampled(16, 4, 256, masked=True), 91, 238),
    "resampler, 30 frames": (RESAMPLER, resampled(2, 1, 30, 256, masked=True), 113, 268),
}


@pytest.mark.parametrize(("make", "call", "forward", "both"), FLAMINGO.values(), ids=FLAMINGO.keys())
def test_layers_of_flamingo_launch_no_more_than_they_did(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, make: Make, call: Call, forward: int, both: int
) -> None:
    """Backward too, by the forms that a GPU takes."""
    why_not = "narrows.ops.media_attention.varlen.why_not_varlen"
    monkeypatch.setattr(why_not, lambda query, *_: None if query.dtype == torch.bfloat16 else "float32")
    monkeypatch.setattr("narrows.layers.perceiver_resampler._in_one_product", lambda tokens: True)
    dtype = torch.float32 if request.node.callspec.id.endswith("float32") else torch.bfloat16
    found = [launches(make, call, dtype=dtype, backward=backward) for backward in (False, True)]
    assert [(count.copies, count.waits) for count in found] == [([], []), ([], [])]
    assert [count.total for count in found] == [forward, both]


@every_implementation
def test_no_layer_waits_for_the_gpu_or_copies_from_the_host(case: LayerCase, impl: str) -> None:
    given, masked = inputs_of(case), with_masks(case)
    for arguments, backward in [(given, False), (masked, False), (masked, True)][not case.padded :]:
        found = launches(lambda: case.construct(impl=impl), on_fakes(case, arguments), backward=backward)
        assert (found.copies, found.waits) == ([], [])


@every_layer
def test_what_is_chosen_on_a_gpu_neither_waits_nor_copies(case: LayerCase) -> None:
    for arguments in (inputs_of(case), with_masks(case)):
        found = launches(lambda: case.construct(impl="auto"), on_fakes(case, arguments))
        assert (found.copies, found.waits) == ([], [])


def with_masks(case: LayerCase) -> dict[str, Tensor]:
    given = inputs_of(case)
    shapes = {name: given[masked].shape[: case.pad_axis + 1] for name, masked in case.padded.items()}
    return {**given, **{name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}}


def on_fakes(case: LayerCase, arguments: dict[str, Tensor]) -> Call:
    def call(layer: nn.Module, device: torch.device) -> dict[str, Tensor]:
        fakes = {}
        for name, value in arguments.items():
            kind = torch.bfloat16 if value.is_floating_point() else value.dtype
            fakes[name] = torch.empty(value.shape, dtype=kind, device=device, requires_grad=kind == torch.bfloat16)
        return case.outputs(layer(**fakes))

    return call


@pytest.mark.parametrize("name", list_models())
def test_no_model_waits_for_the_gpu_or_copies_from_the_host(name: str) -> None:
    side, small = (32, True) if name.endswith("_mini") else (224, name == "sepvit_upstream_lite")
    for backward in (False, True)[: 1 + small]:  # of each kind of model one
        found = launches(lambda: create_model(name, device="meta"), on(2, 3, side, side), backward=backward)
        assert (found.copies, found.waits) == ([], [])


def call_with(found: Callable[[Tensor], Any]) -> Call:
    return lambda module, device: found(torch.empty(4, 8, device=device))


class TestWhatIsSeen:
    """The counting itself."""

    def test_views_and_fresh_storage_are_free(self) -> None:
        found = launches(nn.Identity, call_with(lambda x: torch.empty_like(x.reshape(2, 16).T)))
        assert found.total == 0

    def test_a_linear_map_is_one_launch_and_two_with_its_backward(self) -> None:
        call = on(4, 8)
        assert launches(lambda: nn.Linear(8, 8), call).operations == {"addmm": 1}
        assert launches(lambda: nn.Linear(8, 8, bias=False), call, backward=True).total == 2

    def test_fused_attention_is_one_launch_each_way(self) -> None:
        def attend(module: nn.Module, device: torch.device) -> Tensor:
            parts = [torch.empty(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(3)]
            return nn.functional.scaled_dot_product_attention(*parts)

        assert launches(nn.Identity, attend).total == 1
        assert launches(nn.Identity, attend, backward=True).total == 2

    def test_copies_from_the_host_are_listed_and_numbers_are_not(self) -> None:
        copy = launches(nn.Identity, call_with(lambda x: x + torch.tensor([1.0] * 8, device=x.device)))
        assert copy.copies == ["_to_copy"]
        assert launches(nn.Identity, call_with(lambda x: x * torch.tensor(2.0))).copies == []

    def test_what_reads_a_value_back_is_found(self) -> None:
        assert launches(nn.Identity, call_with(lambda x: x.cpu())).waits == ["_to_copy"]
        with pytest.raises(DataDependentOutputException):
            launches(nn.Identity, call_with(lambda x: x.sum().item()))
        with pytest.raises(DynamicOutputShapeException):
            launches(nn.Identity, call_with(lambda x: x[x > 0]))
