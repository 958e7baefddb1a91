"""Objects out of images and clips without labels: an encoder, slots that compete for its tokens, a decoder."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initial_slots import GaussianSlots, HintedSlots, LearnedSlots
from narrows.layers.slot_attention import NormedSlotAttention, SlotAttention
from narrows.layers.slot_gate import SlotGate
from narrows.layers.slot_mixer import SlotBlock
from narrows.layers.slot_preheat import SlotPreheat
from narrows.layers.slot_transition import SlotTransition
from narrows.models.base import SavedModel
from narrows.models.object_parts import (
    BroadcastDecoder,
    ConvEncoder,
    Encoded,
    FeatureEncoder,
    MixedFeatures,
    MLPFeatures,
    PatchTransformer,
    cells_of,
)
from narrows.ops.object_hints import HINTS
from narrows.precision import at_least_float32
from narrows.validation import check_choice, check_positive, check_tensor, checked

ENCODERS: Mapping[str, type[nn.Module]] = MappingProxyType({"convolutions": ConvEncoder, "features": FeatureEncoder})
DECODERS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"broadcast": BroadcastDecoder, "mlp": MLPFeatures, "mixer": MixedFeatures, "transformer": PatchTransformer}
)
GRADIENTS = ("full", "last", "bilevel")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "slot_autoencoder": {
            "encoder": {"kind": "convolutions"},
            "decoder": {"kind": "broadcast", "image_size": 32},
            "num_slots": 5,
            "slot_dim": 64,
            "num_iterations": 5,
            "gradient": "last",
        },
        "dinosaur": {
            "encoder": {"kind": "features", "feature_dim": 384},
            "decoder": {"kind": "mlp", "feature_dim": 384, "grid": [28, 28]},
            "num_slots": 7,
            "slot_dim": 256,
            "mlp_dim": 1024,
        },
        "spot": {
            "encoder": {"kind": "features", "feature_dim": 768},
            "decoder": {"kind": "transformer", "feature_dim": 768, "num_orders": 9},
            "num_slots": 7,
            "slot_dim": 256,
            "mlp_dim": 1024,
            "initial_slots": "learned",
            "gradient": "bilevel",
        },
        "savi": {
            "encoder": {"kind": "convolutions"},
            "decoder": {"kind": "broadcast", "image_size": 32},
            "num_slots": 5,
            "slot_dim": 64,
            "predictor_heads": 4,
        },
        "slotcontrast": {
            "encoder": {"kind": "features", "feature_dim": 384},
            "decoder": {"kind": "mlp", "feature_dim": 384, "grid": [24, 24], "hidden_dims": [1024, 1024, 1024]},
            "num_slots": 7,
            "slot_dim": 64,
            "mlp_dim": 256,
            "normed_state": True,
            "later_iterations": 2,
            "initial_slots": "learned",
            "predictor_heads": 4,
            "predictor_pre_norm": True,
        },
        "videosaur": {
            "encoder": {"kind": "features", "feature_dim": 768},
            "decoder": {"kind": "mixer", "feature_dim": 768, "grid": [14, 14], "depth": 3, "transitions": True},
            "num_slots": 7,
            "slot_dim": 64,
            "mlp_dim": 0,
            "normed_state": True,
            "later_iterations": 2,
            "predictor_heads": 4,
            "predictor_pre_norm": True,
        },
    }
)


class ObjectDiscoveryOutput(NamedTuple):
    """Objects that were found; of clips every entry has a T after the B.

    Args:
        slots: `[B, K, S]`, 0 at masked slots.
        masks: `[B, K, h, w]`, the decoder's: the share of each slot in each cell or pixel, sums to 1 over the slots.
        attention: `[B, K, h', w']`, the encoder's tokens divided among the slots, sums to 1 over the slots.
        reconstruction: `[B, C, h, w]`, what the decoder rebuilt.
        target: `[B, C, h, w]`, of what: images, or features of a backbone.
        parts: `[B, K, C, h, w]`, what each slot alone rebuilt; None of decoders of features.
        transitions: `[B, N, N]`, logits of where each cell goes in a later frame; None of decoders without them.
        kept: `[B, K]`, 1 for slots that a gate keeps and 0 for those it drops, with a gradient; None without one.
        guess: `[B, K, S]`, what preheated slots were guessed to become, in the first frame of clips; None without that.
    """

    slots: Float[Tensor, "B *T K S"]
    masks: Float[Tensor, "B *T K h w"]
    attention: Float[Tensor, "B *T K h2 w2"]
    reconstruction: Float[Tensor, "B *T C h3 w3"]
    target: Float[Tensor, "B *T C h3 w3"]
    parts: Float[Tensor, "B *T K C h3 w3"] | None
    transitions: Float[Tensor, "B *T N N"] | None = None
    kept: Float[Tensor, "B *T K"] | None = None
    guess: Float[Tensor, "B K S"] | None = None

    @property
    def loss(self) -> Tensor:
        """Mean square error of the reconstruction, what training minimises."""
        return F.mse_loss(self.reconstruction, self.target.to(self.reconstruction.dtype))


class ObjectDiscovery(SavedModel, pipeline_tag="image-segmentation"):
    r"""Slots that rebuild an image, or features of it, and so divide it into objects.

    Images `[B, C, H, W]`, clips `[B, T, C, H, W]`, or, with an encoder of features, cached tokens `[B, N, E]` and
    `[B, T, N, E]`. In a clip the slots of a frame begin as those of the frame before, after the predictor where there
    is one (SAVi): a slot keeps its object.

    Args:
        encoder: a module that returns `Encoded`, or the arguments of one of ours: `{"kind": "convolutions", ...}` makes
            a `ConvEncoder`, "features" a `FeatureEncoder`.
        decoder: a module that returns `Decoded`, or likewise "broadcast", "mlp" or "transformer" with arguments.
        num_slots: K, unless a call says otherwise.
        slot_dim: S, and the width of the encoder's tokens.
        num_iterations: of slot attention in images and in the first frame of a clip.
        later_iterations: in the other frames.
        mlp_dim: hidden width of slot attention's MLP; 0 for none.
        normed_state: whether its GRU starts from normalised slots (VideoSAUR, SlotContrast).
        initial_slots: "gaussian", around one learned mean; "learned", one by one (BO-QSA); "boxes" or "points", made of
            hints that a call brings (SAVi).
        gradient: "full" through all iterations; "last", through the last of each frame alone (implicit differentiation,
            Chang et al. 2022); "bilevel", the same and straight through to the slots that the frame began with
            (BO-QSA). With one later iteration nothing settles, and a frame learns from those after it in any case.
        predictor_heads: heads of a transformer block between frames (SAVi); None for no predictor.
        predictor_pre_norm: whether that block normalises what it reads (VideoSAUR), not what it gives (SAVi).
        predictor_window: frames that the predictor may look back; it then is a `SlotTransition`, which reads the tokens
            of the next frame too (RandSF.Q).
        preheated: whether a `SlotPreheat` guesses from the tokens what initial slots will become, where slot attention
            then begins (SmoothSA); not where a call gives `slots`.
        adaptive: whether a `SlotGate` drops slots that a sample does not need before decoding (AdaSlot). Of dropped
            slots `slots` and `masks` are 0; `attention` is that of all.
        backbone: of an encoder of features: a module from images to tokens. It is not saved.
        device, dtype: where and in what precision parameters are made.

    >>> import torch
    >>> from narrows import create_model
    >>> found = create_model("slot_autoencoder")(torch.randn(2, 3, 32, 32))
    >>> found.slots.shape, found.masks.shape, found.attention.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 32, 32]), torch.Size([2, 5, 16, 16]))

    Locatello et al. 2020, https://arxiv.org/abs/2006.15055; Seitzer et al. 2023 (DINOSAUR),
    https://arxiv.org/abs/2209.14860; Kipf et al. 2022 (SAVi), https://arxiv.org/abs/2111.12594.
    """

    @checked
    def __init__(
        self,
        encoder: nn.Module | dict[str, Any],
        decoder: nn.Module | dict[str, Any],
        *,
        num_slots: int,
        slot_dim: int = 64,
        num_iterations: int = 3,
        later_iterations: int = 1,
        mlp_dim: int | None = None,
        normed_state: bool = False,
        initial_slots: str = "gaussian",
        gradient: str = "full",
        predictor_heads: int | None = None,
        predictor_pre_norm: bool = False,
        predictor_window: int | None = None,
        preheated: bool = False,
        adaptive: bool = False,
        backbone: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"predictor_heads": predictor_heads}
        check_positive(
            num_slots=num_slots, slot_dim=slot_dim, num_iterations=num_iterations, later_iterations=later_iterations
        )
        check_positive(**{name: value for name, value in sizes.items() if value is not None})
        check_choice("initial_slots", initial_slots, ("gaussian", "learned", *HINTS))
        check_choice("gradient", gradient, GRADIENTS)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        given = {} if backbone is None else {"backbone": backbone}
        self.encoder = _part("encoder", encoder, ENCODERS, slot_dim, {**factory, **given})
        self.decoder = _part("decoder", decoder, DECODERS, slot_dim, factory)
        _check_number(num_slots, cells_of(self.decoder))
        self.later_iterations, self.gradient = later_iterations, gradient
        self.hints = initial_slots if initial_slots in HINTS else None
        if self.hints is not None:
            start: nn.Module = HintedSlots(num_slots, slot_dim, hint_dim=HINTS[initial_slots], **factory)
        else:
            start = {"gaussian": GaussianSlots, "learned": LearnedSlots}[initial_slots](num_slots, slot_dim, **factory)
        self.slot_attention = (NormedSlotAttention if normed_state else SlotAttention)(
            slot_dim,
            num_iterations=num_iterations,
            mlp_dim=mlp_dim,
            initial_slots=start,
            **factory,
        )
        self.predictor: SlotBlock | SlotTransition | None = None
        if predictor_window is not None:
            heads = 4 if predictor_heads is None else predictor_heads
            self.predictor = SlotTransition(slot_dim, heads, window=predictor_window, **factory)
        elif predictor_heads is not None:
            self.predictor = SlotBlock(slot_dim, predictor_heads, pre_norm=predictor_pre_norm, **factory)
        self.preheat = SlotPreheat(slot_dim, **factory) if preheated else None
        self.gate = SlotGate(slot_dim, **factory) if adaptive else None

    def forward(
        self,
        images: Float[Tensor, "..."],
        mask: Bool[Tensor, "B N"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
        *,
        hints: Float[Tensor, "B K C"] | None = None,
        slot_mask: Bool[Tensor, "B K"] | None = None,
        num_iterations: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> ObjectDiscoveryOutput:
        """Find objects.

        Args:
            images: images, clips, or cached tokens of either.
            mask: `[B, N]`, tokens that are real; the slots do not read the others. Not in clips.
            slots: initial slots, of the first frame in clips; drawn if None.
            num_slots: K of this call.
            generator: draws the initial slots.
            hints: `[B, K, 4]` boxes or `[B, K, 2]` points, of the first frame in clips, for a model whose
                `initial_slots` are made of them; see `narrows.ops.object_hints`.
            slot_mask: `[B, K]`, slots that are real: a sample gets what it gets with those alone.
            num_iterations: of this call, in images and in the first frame of a clip. A trained model often finds more
                with a few more than it was trained with.
            size: height and width of `masks` and `attention`, resized bilinearly; by default the decoder's cells and
                the encoder's tokens.

        Raises:
            InvalidArgument, InvalidType: images of the wrong shape or type, hints that are missing or not asked for,
                more slots than the decoder has positions.
        """
        check_tensor("images", images, expected="a tensor of images, clips or tokens")
        first = self.slot_attention.num_iterations if num_iterations is None else num_iterations
        check_positive(num_iterations=first)
        still = 3 if self._takes_tokens(images) else 4
        if images.ndim not in (still, still + 1):
            raise InvalidArgument(
                "images",
                expected="images [B, C, H, W], clips [B, T, C, H, W], or cached tokens [B, N, E] and "
                "[B, T, N, E] of an encoder of features",
                got=f"shape {tuple(images.shape)}",
            )
        clips = images.ndim == still + 1
        if clips and mask is not None:
            raise InvalidArgument("mask", expected="None for clips", got=f"shape {tuple(mask.shape)}")
        cold = slots is None
        if hints is not None or (self.hints is not None and cold):
            slots = self._begun_at(hints, slots)
        frames = images.shape[1] if clips else 1
        encoded: Encoded = self.encoder(images.flatten(0, 1) if clips else images)
        tokens = encoded.tokens.unflatten(0, (-1, frames))
        guess = None
        if self.preheat is not None and cold:
            begin = self.slot_attention.initial_slots(len(tokens), slots, num_slots, generator)
            guess, slots = self.preheat(begin, tokens[:, 0], mask, slot_mask, generator)
        found: list[Tensor] = []
        attention: list[Tensor] = []
        for frame in range(frames):
            iterations = first if frame == 0 else self.later_iterations
            if frame > 0:
                slots = self._predicted(found, tokens[:, : frame + 1], slot_mask, generator)
            new, weights = self._attend(tokens[:, frame], mask, slots, num_slots, generator, slot_mask, iterations)
            found.append(new)
            attention.append(weights)
        joined = torch.stack(found, 1).flatten(0, 1)
        _check_number(joined.shape[1], cells_of(self.decoder) or encoded.target.shape[-2] * encoded.target.shape[-1])
        if slot_mask is not None and clips:
            slot_mask = slot_mask.repeat_interleave(frames, 0)
        kept = None
        if self.gate is not None:
            kept = slot_mask = self.gate(joined, slot_mask, generator)
            joined = joined * kept.detach().unsqueeze(2).to(joined.dtype)
        decoded = self.decoder(joined, encoded.target, slot_mask)
        maps = torch.stack(attention, 1).flatten(0, 1).unflatten(2, encoded.grid)
        masks = decoded.masks
        if size is not None:
            maps, masks = (
                F.interpolate(at_least_float32(each), size, mode="bilinear", align_corners=False)
                for each in (maps, masks)
            )
        parts = (
            *(joined, masks, maps, decoded.reconstruction, encoded.target),
            *(decoded.parts, decoded.transitions, kept),
        )
        if clips:
            parts = (None if part is None else part.unflatten(0, (-1, frames)) for part in parts)
        return ObjectDiscoveryOutput(*parts, guess)  # pyright: ignore[reportArgumentType]

    def _predicted(
        self, found: list[Tensor], tokens: Tensor, slot_mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The slots with which the last of these frames begins."""
        if isinstance(self.predictor, SlotTransition):
            return self.predictor(torch.stack(found, 1), tokens, slot_mask, generator)
        return found[-1] if self.predictor is None else self.predictor(found[-1], slot_mask)

    def _begun_at(self, hints: Tensor | None, slots: Tensor | None) -> Tensor:
        start = self.slot_attention.initial_slots
        if not isinstance(start, HintedSlots):
            expected = "None: initial slots are drawn or learned"
            raise InvalidArgument("hints", expected=expected, got="hints", hint="Build with initial_slots='boxes'.")
        if hints is None or slots is not None:
            got = "none" if hints is None else "slots as well"
            raise InvalidArgument("hints", expected=f"{self.hints} for the slots, [B, K, {start.hint_dim}]", got=got)
        return start.of(hints)

    def _takes_tokens(self, images: Tensor) -> bool:
        """Whether these are cached tokens: of three axes, or of four that no image could have."""
        encoder = self.encoder
        return isinstance(encoder, FeatureEncoder) and (
            images.ndim == 3
            or (
                images.ndim == 4
                and images.shape[-1] == encoder.feature_dim
                and (encoder.backbone is None or images.shape[1] != 3)
            )
        )

    def _attend(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Tensor | None,
        slots: Tensor | None,
        num_slots: int | None,
        generator: torch.Generator | None,
        slot_mask: Tensor | None,
        iterations: int,
    ) -> tuple[Tensor, Tensor]:
        attend = self.slot_attention
        if self.gradient == "full":
            return attend(tokens, mask, slots, num_slots, generator, num_iterations=iterations, slot_mask=slot_mask)
        start = slots
        if start is None:
            start = attend.initial_slots(len(tokens), None, num_slots, generator)
        if iterations > 1:
            with torch.no_grad():
                settled, _ = attend(tokens, mask, start, num_iterations=iterations - 1, slot_mask=slot_mask)
            # Without a detour through the iterations, to the slots that they began with.
            start = settled + (start - start.detach()) if self.gradient == "bilevel" else settled
        return attend(tokens, mask, start, num_iterations=1, slot_mask=slot_mask)


def _check_number(slots: int, cells: int | None) -> None:
    if cells is not None and slots > cells:
        raise InvalidArgument("num_slots", expected=f"at most the {cells} positions of the decoder", got=slots)


def _part(
    name: str,
    given: nn.Module | dict[str, Any],
    kinds: Mapping[str, type[nn.Module]],
    dim: int,
    options: dict[str, Any],
) -> nn.Module:
    """A module as it is, or the one that a dictionary describes."""
    if isinstance(given, nn.Module):
        return given
    if "kind" not in given:
        raise InvalidArgument(
            name, expected=f"a module, or a dictionary with a 'kind' of {', '.join(kinds)}", got=given
        )
    check_choice(f"{name}['kind']", given["kind"], tuple(kinds))
    arguments = {key: value for key, value in given.items() if key != "kind"}
    try:
        return kinds[given["kind"]](dim, **arguments, **options)
    except TypeError as error:
        expected = f"arguments of a {kinds[given['kind']].__name__}"
        raise InvalidArgument(name, expected=expected, got=f"{given} ({error})") from error
