"""Where media stand in a text, and whether that is where the media given belong."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.validation import check_mask


def locate(
    text: Tensor,
    attention_mask: Tensor | None,
    media_locations: Bool[Tensor, "B T"] | None,
    media_token_id: int | None,
) -> Bool[Tensor, "B T"]:
    """Where media stand in `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`, padding aside."""
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
    """Raise unless every row has as many media as places for them."""
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
    """Where a packed row begins a document: positions do not count on, as transformers has it; None without packing."""
    if position_ids is None or attention_mask is not None or position_ids.ndim != 2:
        return None
    return torch.diff(position_ids, dim=1, prepend=position_ids[:, :1] - 2) != 1
