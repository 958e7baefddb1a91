"""Where the media of a batch are: their parts of the media tensor, and their places in the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_positive

IMAGE_DIMS = 4


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
    name: str,
    *,
    media_token_id: int | None,
    tokens_per_medium: int | None = None,
    media_axis: int | None = None,
) -> list[Medium]:
    """Every medium of a batch; the arguments are those of `narrows.audit`.

    Raises:
        InvalidArgument: the tokens of media are unknown, or do not match the media.
    """
    check_positive(tokens_per_medium=1 if tokens_per_medium is None else tokens_per_medium)
    if media_axis is not None:
        check_choice("media_axis", str(media_axis), ("0", "1"))
    media, rows = batch[name], _token_positions(batch, media_token_id)
    if name == "media" and tokens_per_medium is None:
        tokens_per_medium = 1  # of a Flamingo, whose neighbouring tokens are media of their own
    grids = batch.get("video_grid_thw" if "video" in name else "image_grid_thw")
    if isinstance(media, list | tuple):  # Fuyu: for each row the patches of its image
        starts = [positions[:1] for positions in rows]
        parts = {(row, 0): (row,) for row in range(min(len(media), len(rows)))}
    elif grids is not None and media_axis is None and tokens_per_medium is None:
        starts, parts = _of_sizes(grids.prod(-1).tolist(), rows, len(media))
    else:
        axis = _axis(name, media, rows) if media_axis is None else media_axis
        starts = [_starts(row, rows, media, axis, tokens_per_medium) for row in range(len(rows))]
        parts = _even_parts(media, starts, axis)
    mask = batch.get("media_mask")
    return [_medium(row, index, where, starts[row], mask, _documents(batch)) for (row, index), where in parts.items()]


Parts = dict[tuple[int, int], tuple[int | slice, ...]]


def _axis(name: str, media: Tensor, rows: Sequence[Sequence[int]]) -> int:
    """The axis that counts media, told by how many there are in the text."""
    if name == "media":
        return 1
    if media.ndim <= IMAGE_DIMS:  # [n, C, H, W], or sound [n, bins, frames]
        return 0
    runs = [len(_runs(row)) for row in rows]
    counts = {max(runs), max(map(len, rows))}
    by_row = len(media) == len(rows) and media.shape[1] in counts
    if not by_row and len(media) != sum(runs):
        raise InvalidArgument(
            "media_axis",
            expected=f"0 or 1: the axis that counts media, of {len(media)} or of {media.shape[1]}",
            got=f"shape {tuple(media.shape)} for {sum(runs)} places in {len(rows)} rows",
        )
    return 1 if by_row else 0


def _starts(
    row: int, rows: Sequence[Sequence[int]], media: Tensor, axis: int, tokens_per_medium: int | None
) -> list[int]:
    """The first position of each medium of a row."""
    positions, total = rows[row], sum(map(len, rows))
    if tokens_per_medium is None:
        num_runs, longest = [len(_runs(each)) for each in rows], max(map(len, rows))
        num_media = len(media) if axis == 0 else media.shape[1]
        if num_media == (sum(num_runs) if axis == 0 else max(num_runs)) and num_media < total:
            return [run[0] for run in _runs(positions)]
        even = axis == 0 and num_media and total % num_media == 0 and total > num_media
        tokens_per_medium = total // num_media if even else 1
        if axis == 1 and longest > num_media > 0 and longest % num_media == 0:
            tokens_per_medium = longest // num_media
    if len(positions) % tokens_per_medium:
        raise InvalidArgument(
            "tokens_per_medium",
            expected=f"a divisor of the {len(positions)} media tokens of row {row}",
            got=tokens_per_medium,
        )
    return list(positions[::tokens_per_medium])


def _runs(positions: Sequence[int]) -> list[list[int]]:
    """Positions that follow each other, together."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _even_parts(media: Tensor, starts: Sequence[Sequence[int]], axis: int) -> Parts:
    """The part of each medium where all have parts of one size."""
    if axis == 0:
        size, rest = divmod(len(media), max(1, total := sum(map(len, starts))))
        if rest or not total:
            raise InvalidArgument(
                "media", expected=f"an axis 0 that {total} media share evenly", got=f"shape {tuple(media.shape)}"
            )
        slots = [(row, index) for row, places in enumerate(starts) for index in range(len(places))]
        return {slot: (slice(number * size, (number + 1) * size),) for number, slot in enumerate(slots)}
    if media.ndim < 3 or len(media) != len(starts):
        raise InvalidArgument(
            "media",
            expected=f"shape [B, M, ...] with B = {len(starts)}",
            got=f"shape {tuple(media.shape)}",
            hint="If the media of all rows are concatenated, say media_axis=0.",
        )
    return {(row, index): (row, index) for row in range(len(starts)) for index in range(media.shape[1])}


def _of_sizes(sizes: Sequence[int], rows: Sequence[Sequence[int]], patches: int) -> tuple[list[list[int]], Parts]:
    """The first positions of each row's media, and the part of each, where media have patches of different numbers."""
    total = sum(map(len, rows))
    merged, rest = divmod(patches, max(1, total))
    if sum(sizes) != patches or rest or any(size % merged for size in sizes):
        raise InvalidArgument(
            "grid_thw", expected=f"{patches} patches for {total} media tokens", got=f"grids of {list(sizes)} patches"
        )
    starts: list[list[int]] = [[] for _ in rows]
    parts: Parts = {}
    row, taken, first = 0, 0, 0
    for size in sizes:
        while row < len(rows) and taken == len(rows[row]):
            row, taken = row + 1, 0
        parts[row, len(starts[row])] = (slice(first, first + size),)
        starts[row].append(rows[row][taken])
        taken, first = taken + size // merged, first + size
        if taken > len(rows[row]):
            raise InvalidArgument("grid_thw", expected=f"media within row {row}", got=f"{size // merged} tokens")
    return starts, parts


def real_text(batch: Mapping[str, Any]) -> Bool[Tensor, "B T"]:
    """True at text that is not padding."""
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


def _token_positions(batch: Mapping[str, Any], token: int | None) -> list[list[int]]:
    """Positions of the media's tokens in each row."""
    ids, locations = batch["input_ids"], batch.get("media_locations")
    if locations is None and (patches := batch.get("image_patches_indices")) is not None:
        locations = patches >= 0
    if locations is None and token is None:
        raise InvalidArgument(
            "media_token_id",
            expected="the id of the token that stands for a medium",
            got=None,
            hint="Give it, or media_locations [B, T] in the batch.",
        )
    locations = (ids == token if locations is None else locations.bool()) & real_text(batch)
    rows = [row.nonzero().flatten().tolist() for row in locations]
    if not any(rows):
        raise InvalidArgument("batch", expected=f"a media token {token} in its text", got="none")
    return rows


def _documents(batch: Mapping[str, Any]) -> Int[Tensor, "B T"]:
    """The number of each token's document in its row: positions restart in each document."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None or positions.shape != ids.shape:
        return torch.zeros_like(ids)
    return F.pad(positions.diff(dim=-1) < 0, (1, 0)).cumsum(-1)
