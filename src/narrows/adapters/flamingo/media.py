"""The media of a call: encoded to latents, and matched with their places in the text."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from narrows.errors import InvalidArgument
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
        mask: `[B, M]`, or of every token of encoded media; True at real media, False at padding.
        vision_encoder: images `[n, 3, H, W]` to tokens.
        resampler: tokens to latents.
    """
    images = _check(media, mask, encoder=vision_encoder is not None, dim=resampler.dim)
    like = resampler.latents
    of_tokens = mask if mask is not None and mask.ndim > 2 else None
    if mask is None:
        mask = torch.ones(media.shape[:2], dtype=torch.bool, device=media.device)
    present = mask.flatten(2).any(-1) if mask.ndim > 2 else mask
    counts = present.sum(1)
    if not counts.any():
        return no_media(len(media), resampler)
    slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    latents = like.new_zeros(*slots.shape, *like.shape)
    real = media[present]  # [n, ...]
    real = _tokens_of(vision_encoder, real) if images and vision_encoder is not None else real
    readable = None if of_tokens is None else of_tokens[present].unsqueeze(1).to(like.device)
    made = resampler(real.to(like.device, like.dtype).unsqueeze(1), readable).squeeze(1)
    latents = latents.index_put(slots.to(like.device).nonzero(as_tuple=True), made)
    return EncodedMedia(latents, counts.to(like.device))


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
    if mask is not None and mask.ndim > 2 and media.ndim in encoded:
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
    counts = torch.zeros(num_texts, dtype=torch.long, device=like.device)
    if not (resampler.training and torch.is_grad_enabled()):
        return EncodedMedia(like.new_zeros(num_texts, 0, *like.shape), counts)
    latents = resampler(like.new_zeros(num_texts, 1, 1, resampler.dim))
    return EncodedMedia(latents, counts)


def _tokens_of(encoder: nn.Module, images: Float[Tensor, "n *frames C H W"]) -> Float[Tensor, "n *frames N D"]:
    """Tokens of each image: timm's `forward_features`, transformers' last hidden state, or what the encoder returns."""
    parameter = next(encoder.parameters(), images)
    images = images.to(parameter.device, parameter.dtype)
    run: Any = getattr(encoder, "forward_features", encoder)
    flat = run(images.flatten(0, -4))
    features: Tensor = getattr(flat, "last_hidden_state", flat)
    if features.ndim == 4:  # a map [n, D, h, w]
        features = features.flatten(2).transpose(1, 2)
    if features.ndim == 2:  # one vector for an image
        features = features.unsqueeze(1)
    return features.unflatten(0, images.shape[:-3])


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
