"""The media of a call: encoded to latents, and matched with their places in the text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from narrows.adapters.flamingo.host import execution_device
from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.perceiver_resampler import PerceiverResampler
from narrows.validation import check_mask, check_tokens


class EncodedMedia(NamedTuple):
    """Latents of the media of each text, in the order of the text and without gaps.

    Args:
        latents: `[B, M, K, D]`, padded to M media for each text.
        counts: `[B]`, number of media of each text.
    """

    latents: Float[Tensor, "B M K D"]
    counts: Int[Tensor, " B"]


def stack_media(media: Sequence[Any], mask: Tensor | None) -> tuple[Tensor, Bool[Tensor, "B M *N"]]:
    """Media `[B, M, ...]` and their mask, from a list of the media of each row: tensors, or lists of tensors.

    Media of different numbers, and clips and encoded media of different lengths (their first axis), are padded.
    """
    rows = [list(row) for row in media]
    tensors = [medium for row in rows for medium in row]
    if mask is not None:
        raise InvalidArgument("media_mask", expected="None with a list of media, which has no padding", got="a mask")
    if not all(isinstance(medium, Tensor) for medium in tensors):
        raise InvalidType(
            "media",
            expected="for each row a tensor [M, ...] or a list of tensors",
            got=f"a list with {next(type(one).__name__ for one in tensors if not isinstance(one, Tensor))} in it",
        )
    rests = {tuple(medium.shape[1:]) for medium in tensors}
    if len(rests) > 1:
        raise InvalidArgument("media", expected="media that differ in their first axis alone", got=f"shapes {rests}")
    most, longest = max(map(len, rows), default=0), max((len(medium) for medium in tensors), default=0)
    if not tensors:
        return torch.zeros(len(rows), 0, 1, 1), torch.zeros(len(rows), 0, dtype=torch.bool)
    padded = tensors[0].new_zeros(len(rows), most, longest, *tensors[0].shape[1:])
    real = torch.zeros(len(rows), most, longest, dtype=torch.bool, device=padded.device)
    for row, of_row in enumerate(rows):
        for column, medium in enumerate(of_row):
            padded[row, column, : len(medium)] = medium
            real[row, column, : len(medium)] = True
    even = all(len(medium) == longest for medium in tensors)
    return padded, real.any(-1) if even else real


def encode(
    media: Float[Tensor, "B M *medium"],
    mask: Bool[Tensor, "B M *N"] | None,
    *,
    vision_encoder: nn.Module | None,
    resampler: PerceiverResampler,
) -> EncodedMedia:
    """Encode and resample media, padding left out.

    Args:
        media: images `[B, M, 3, H, W]` or clips `[B, M, F, 3, H, W]` for `vision_encoder`; encoded `[B, M, N, D]`, or
            encoded clips `[B, M, F, N, D]` where there is no encoder.
        mask: `[B, M]`, of every frame of clips, or of every token of encoded media; True at real media, False at
            padding.
        vision_encoder: images `[n, 3, H, W]` to tokens.
        resampler: tokens to latents.
    """
    images = _check(media, mask, encoder=vision_encoder is not None, dim=resampler.dim)
    if mask is None:
        mask = torch.ones(media.shape[:2], dtype=torch.bool, device=media.device)
    present = mask.flatten(2).any(-1) if mask.ndim > 2 else mask
    counts = present.sum(1)
    device, dtype = execution_device(resampler, resampler.latents), resampler.latents.dtype
    if torch.compiler.is_compiling():
        # A graph has one shape: all are encoded, and those of a row that are real are moved before the others.
        order = present.int().argsort(dim=1, descending=True, stable=True)
        chosen = (torch.arange(len(media), device=order.device)[:, None].expand_as(order), order)
    elif not counts.any():
        return no_media(len(media), resampler)
    else:
        chosen = present.nonzero(as_tuple=True)
    real, of_parts = media[chosen], mask[chosen] if mask.ndim > 2 else None
    if torch.compiler.is_compiling():
        there = mask[chosen][(...,) + (None,) * (real.ndim - mask.ndim)]
        real = real.masked_fill(~there, 0.0).flatten(0, 1)
        of_parts = None if of_parts is None else (of_parts | ~of_parts.any(-1, keepdim=True)).flatten(0, 1)
    if images and vision_encoder is not None:
        real = _tokens_of(vision_encoder, real, resampler.dim, of_parts)
        of_parts = None if of_parts is None else of_parts[..., None].expand(real.shape[:-1])
    readable = None if of_parts is None else of_parts.unsqueeze(1).to(device)
    made = resampler(real.to(device, dtype).unsqueeze(1), readable).squeeze(1)
    if torch.compiler.is_compiling():
        return EncodedMedia(made.unflatten(0, media.shape[:2]), counts.to(device))
    slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    latents = torch.zeros(*slots.shape, *made.shape[1:], device=device, dtype=made.dtype)
    latents = latents.index_put(slots.to(device).nonzero(as_tuple=True), made)
    return EncodedMedia(latents, counts.to(device))


def _check(media: Tensor, mask: Tensor | None, *, encoder: bool, dim: int) -> bool:
    """Whether media are images or clips, not encoded; raise if their shape is none of the known."""
    images = {5: "[B, M, 3, H, W]", 6: "[B, M, F, 3, H, W]"} if encoder else {}
    encoded = {4: "[B, M, N, D]"} | ({} if encoder else {5: "[B, M, F, N, D]"})
    if media.ndim not in images and media.ndim not in encoded:
        raise InvalidArgument(
            "media",
            expected=f"one of {[*images.values(), *encoded.values()]}",
            got=f"shape {tuple(media.shape)}",
            hint="" if encoder else "Images need a vision_encoder.",
        )
    if media.ndim in images:
        check_tokens("media", media, layout=images[media.ndim])
    else:
        check_tokens("media", media, dim=dim, layout=encoded[media.ndim])
    if mask is not None and mask.ndim == 3 and images.get(media.ndim, "").startswith("[B, M, F"):
        check_mask("media_mask", mask, tuple(media.shape[:3]), layout="[B, M, F]")
    elif mask is not None and mask.ndim > 2 and media.ndim in encoded:
        layout = encoded[media.ndim].replace(", D", "")
        check_mask("media_mask", mask, tuple(media.shape[:-1]), layout=layout)
    else:
        check_mask("media_mask", mask, tuple(media.shape[:2]), layout="[B, M]")
    return media.ndim in images


def no_media(num_texts: int, resampler: PerceiverResampler) -> EncodedMedia:
    """The latents of a call without media.

    In training, one medium that no text sees: every parameter gets a gradient in every step, as DDP and FSDP need.
    """
    like = resampler.latents
    place: dict[str, Any] = {"device": execution_device(resampler, like), "dtype": like.dtype}
    counts = torch.zeros(num_texts, dtype=torch.long, device=place["device"])
    if not (resampler.training and torch.is_grad_enabled()):
        return EncodedMedia(torch.zeros(num_texts, 0, *like.shape, **place), counts)
    return EncodedMedia(resampler(torch.zeros(num_texts, 1, 1, resampler.dim, **place)), counts)


def _tokens_of(
    encoder: nn.Module, images: Float[Tensor, "n *frames C H W"], dim: int, frames: Bool[Tensor, "n F"] | None
) -> Float[Tensor, "n *frames N D"]:
    """Tokens of each image: timm's `forward_features`, transformers' last hidden state, or what the encoder returns.

    Of clips with padding only the real `frames` are encoded; the tokens of others are 0.
    """
    parameter = next(encoder.parameters(), images)
    images = images.to(execution_device(encoder, parameter), parameter.dtype)
    run: Any = getattr(encoder, "forward_features", encoder)
    places = None if frames is None or torch.compiler.is_compiling() else frames.to(images.device)
    flat = run(images.flatten(0, -4) if places is None else images[places])
    features: Tensor = getattr(flat, "last_hidden_state", flat)
    if features.ndim == 4:  # a map [n, D, h, w], or [n, h, w, D] as timm's Swin has it
        last = getattr(encoder, "output_fmt", "") == "NHWC" or (features.shape[1] != dim == features.shape[-1])
        features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
    if features.ndim == 2:  # one vector for an image
        features = features.unsqueeze(1)
    if places is None:
        return features.unflatten(0, images.shape[:-3])
    empty = torch.zeros(*places.shape, *features.shape[1:], device=features.device, dtype=features.dtype)
    return empty.index_put(places.nonzero(as_tuple=True), features)


def width_of(encoder: nn.Module | None) -> int | None:
    """The width of an encoder's tokens, if an attribute or its config has it."""
    config = getattr(encoder, "config", None)
    for source, name in ((encoder, "num_features"), (encoder, "embed_dim"), (config, "hidden_size")):
        if isinstance(width := getattr(source, name, None), int):
            return width
    return None


def locate(
    text: Tensor,
    attention_mask: Tensor | None,
    media_locations: Bool[Tensor, "B T"] | None,
    media_token_id: int | None,
) -> Bool[Tensor, "B T"]:
    """True at the media tokens of `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`, except in padding."""
    shape = text.shape[:2]
    if media_locations is not None:
        check_mask("media_locations", media_locations, tuple(shape), layout="[B, T]")
        locations = media_locations.to(text.device)
    elif media_token_id is not None and text.ndim == 2:
        locations = text == media_token_id
    else:
        locations = torch.zeros(shape, dtype=torch.bool, device=text.device)
    if attention_mask is not None and attention_mask.ndim == 2:
        locations = locations & attention_mask[:, -shape[1] :].to(text.device).bool()
    return locations


def check_counts(locations: Bool[Tensor, "B T"], counts: Int[Tensor, " rows"]) -> None:
    """Raise unless every row has as many media as media tokens."""
    places = locations.sum(1)
    if torch.compiler.is_compiling():  # a graph does not read values back
        return
    if len(places) != len(counts):
        raise InvalidArgument("media", expected=f"media for each of {len(places)} rows of text", got=len(counts))
    wrong = (places != counts.to(places.device)).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise InvalidArgument(
            "media",
            expected=f"{int(places[row])} media in row {row}, one for each place in its text",
            got=f"{int(counts[row])}, and {len(wrong)} of {len(places)} rows wrong",
            hint="Places are the tokens media_token_id, or media_locations, in text that is not in the cache already. "
            "Rows with fewer media than others need media_mask.",
        )


def document_starts(position_ids: Tensor | None, attention_mask: Tensor | None) -> Bool[Tensor, "B T"] | None:
    """True where a document begins in a packed row, known by restarting positions; None without packing."""
    if position_ids is None or attention_mask is not None or position_ids.ndim != 2:
        return None
    return torch.diff(position_ids, dim=1, prepend=position_ids[:, :1] - 2) != 1
