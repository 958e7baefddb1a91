"""Where the media of a batch are, in their tensor and in the text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_positive


@dataclass(frozen=True)
class Medium:
    """One medium of a batch.

    Args:
        row: of the text it belongs to.
        index: which medium of that row.
        position: of its first token in the text; None if it has none.
        where: index of its part of the media tensor.
        should_move: `[B, T]`, True at the text that depends on it in a causal model.
    """

    row: int
    index: int
    position: int | None
    where: tuple[int | slice, ...]
    should_move: Bool[Tensor, "B T"]


def find_media(
    batch: Mapping[str, Any],
    media: Tensor,
    *,
    media_token_id: int | None,
    tokens_per_medium: int = 1,
    media_axis: int = 1,
) -> list[Medium]:
    """Every medium of a batch; the arguments are those of `narrows.measure.audit`.

    Raises:
        InvalidArgument: no way to tell where media stand, or media and their tokens do not belong together.
    """
    check_positive(tokens_per_medium=tokens_per_medium)
    check_choice("media_axis", str(media_axis), ("0", "1"))
    starts = [row[::tokens_per_medium] for row in _token_positions(batch, media_token_id, tokens_per_medium)]
    if media_axis == 0:
        size, rest = divmod(len(media), max(1, total := sum(map(len, starts))))
        if rest or not total:
            raise InvalidArgument(
                "media", expected=f"an axis 0 that {total} media share evenly", got=f"shape {tuple(media.shape)}"
            )
        slots = [(row, index) for row, places in enumerate(starts) for index in range(len(places))]
        parts = {slot: (slice(number * size, (number + 1) * size),) for number, slot in enumerate(slots)}
    else:
        if media.ndim < 3 or len(media) != len(starts):
            raise InvalidArgument(
                "media",
                expected=f"shape [B, M, ...] with B = {len(starts)}",
                got=f"shape {tuple(media.shape)}",
                hint="Where the media of all rows stand one after another, say media_axis=0.",
            )
        parts = {(row, index): (row, index) for row in range(len(starts)) for index in range(media.shape[1])}
    mask = batch.get("media_mask")
    return [_medium(row, index, where, starts[row], mask, _documents(batch)) for (row, index), where in parts.items()]


def real_text(batch: Mapping[str, Any]) -> Bool[Tensor, "B T"]:
    """True at text that is no padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)


def _medium(
    row: int,
    index: int,
    where: tuple[int | slice, ...],
    starts: list[int],
    mask: Tensor | None,
    documents: Int[Tensor, "B T"],
) -> Medium:
    position = starts[index] if index < len(starts) else None
    should_move = torch.zeros_like(documents, dtype=torch.bool)
    if position is not None and (mask is None or bool(mask[row, index].any())):
        should_move[row, position:] = documents[row, position:] == documents[row, position]
    return Medium(row, index, position, where, should_move)


def _token_positions(batch: Mapping[str, Any], token: int | None, tokens_per_medium: int) -> list[list[int]]:
    """Positions of the media's tokens in each row."""
    ids, locations = batch["input_ids"], batch.get("media_locations")
    if locations is None and token is None:
        raise InvalidArgument(
            "media_token_id",
            expected="the id of the token that stands for a medium",
            got=None,
            hint="Give it, or media_locations [B, T] in the batch.",
        )
    locations = (ids == token if locations is None else locations.bool()) & real_text(batch)
    rows = [row.nonzero().flatten().tolist() for row in locations]
    for number, row in enumerate(rows):
        if len(row) % tokens_per_medium:
            raise InvalidArgument(
                "tokens_per_medium",
                expected=f"a divisor of the {len(row)} media tokens of row {number}",
                got=tokens_per_medium,
            )
    if not any(rows):
        raise InvalidArgument("batch", expected=f"a media token {token} in its text", got="none")
    return rows


def _documents(batch: Mapping[str, Any]) -> Int[Tensor, "B T"]:
    """The number of each token's document in its row: a new one begins where positions fall."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None or positions.shape != ids.shape:
        return torch.zeros_like(ids)
    return F.pad(positions.diff(dim=-1) < 0, (1, 0)).cumsum(-1)
