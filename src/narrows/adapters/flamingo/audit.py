"""A causality check of models that read media: which text positions depend on which medium, and which must not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument, InvalidType
from narrows.measure import evaluating
from narrows.routing import Routing
from narrows.validation import check_choice, check_positive, checked


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
    """Every medium of a batch; the arguments are those of `narrows.audit`.

    Raises:
        InvalidArgument: the tokens of media are unknown, or do not match the media.
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
                hint="If the media of all rows are concatenated, say media_axis=0.",
            )
        parts = {(row, index): (row, index) for row in range(len(starts)) for index in range(media.shape[1])}
    mask = batch.get("media_mask")
    return [_medium(row, index, where, starts[row], mask, _documents(batch)) for (row, index), where in parts.items()]


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
    """The number of each token's document in its row: positions restart in each document."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None or positions.shape != ids.shape:
        return torch.zeros_like(ids)
    return F.pad(positions.diff(dim=-1) < 0, (1, 0)).cumsum(-1)


@dataclass(frozen=True)
class Finding:
    """Text positions that depend on a medium and must not, or should and do not.

    Args:
        medium: the one that was changed.
        row: of the text.
        positions: of the text in that row.
        change: the greatest change of a logit there; 0 if there is none.
    """

    medium: Medium
    row: int
    positions: tuple[int, ...]
    change: float


@dataclass(frozen=True)
class Audit:
    """The change of the logits by each medium. `str()` of it is the report.

    Args:
        media: the media that were changed, one after another.
        change: `[media, B, T]`, the greatest change of a logit at each position when that medium was changed.
        expected: `[media, B, T]`, True where logits should change: at real text from the medium on, in its own row and
            document.
        judged: `[B, T]`, True at real text; padding is not judged.
        threshold: changes up to this count as none.
    """

    media: tuple[Medium, ...]
    change: Float[Tensor, "media B T"]
    expected: Bool[Tensor, "media B T"]
    judged: Bool[Tensor, "B T"]
    threshold: float

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """Positions that changed and must not."""
        return self._findings((self.change > self.threshold) & ~self.expected & self.judged)

    @property
    def blind(self) -> tuple[Finding, ...]:
        """Positions that should change and did not."""
        return self._findings((self.change <= self.threshold) & self.expected & self.judged)

    @property
    def passed(self) -> bool:
        """Whether there is neither a leak nor a blind position."""
        return not self.leaks and not self.blind

    def routing(self) -> Routing:
        """The change of each position by each medium of its own row, as a share of the greatest: `[B, 1, M, T]`."""
        rows, positions = self.judged.shape
        weights = self.change.new_zeros(rows, 1, 1 + max(medium.index for medium in self.media), positions)
        for medium, change in zip(self.media, self.change, strict=True):
            weights[medium.row, 0, medium.index] = change[medium.row] * self.judged[medium.row]
        return Routing(weights / weights.amax().clamp(min=torch.finfo(weights.dtype).tiny), "media")

    def __str__(self) -> str:
        leaks, blind = self.leaks, self.blind
        lines = [
            f"{len(self.media)} media changed, {int(self.judged.sum())} text positions watched: "
            f"{_count(leaks)} moved and must not, {_count(blind)} should move and did not."
        ]
        lines += [
            f"leak:  {_medium_in_words(finding)} moves {_positions_in_words(finding)}, by up to {finding.change:.2g}"
            for finding in leaks
        ]
        lines += [
            f"blind: {_medium_in_words(finding)} does not move {_positions_in_words(finding)}" for finding in blind
        ]
        if self.expected.any() and not (self.change > self.threshold).any():
            lines.append("Nothing moves: the text does not depend on its media at all. Are gates still closed?")
        return "\n".join(lines)

    def _findings(self, where: Tensor) -> tuple[Finding, ...]:
        return tuple(
            Finding(
                self.media[index],
                row,
                tuple(where[index, row].nonzero().flatten().tolist()),
                self.change[index, row][where[index, row]].max().item(),
            )
            for index, row in where.any(-1).nonzero().tolist()
        )


@checked
def audit(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    media: str | None = None,
    media_token_id: int | None = None,
    tokens_per_medium: int = 1,
    media_axis: int = 1,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Audit:
    """Change each medium of a batch in turn and see which logits change: text must not depend on later media.

    Text before a medium, text of another row or of another packed document must not move by one bit; neither may
    anything where a medium is masked, or has no place in the text. Text from the medium on should move: at least
    through the language model's own attention, whichever media the model lets it read directly.

    The model is anything called as `model(**batch)` that gives logits `[B, T, V]` for `input_ids` `[B, T]`: a
    `narrows.Flamingo`, or a vision-language model of transformers. It runs once for each medium and twice more, in
    evaluation mode; two equal runs that differ raise the threshold to what they differ by.

    Args:
        model: the model.
        batch: its arguments. `attention_mask` says which text is real, `media_mask` `[B, M]` or `[B, M, N]` which media
            are, `position_ids` that fall where a new document begins in the row.
        media: which argument holds the media; by default the first that is there of `media`, `pixel_values`, `images`,
            `input_features`.
        media_token_id: the token that stands for a medium in the text; by default `batch["media_locations"]` where it
            is given, or what the model or its config calls `media_token_id`, `image_token_id` or `image_token_index`.
        tokens_per_medium: how many such tokens in a row one medium takes (LLaVA: one for each patch).
        media_axis: the axis that counts media. 1: `[B, M, ...]`. 0: those of all rows one after another, each an equal
            part of it.
        tolerance: change of a logit that still counts as none.
        generator: draws what media are changed to: noise of their own mean and spread.

    Raises:
        InvalidArgument: media or their places are not found, or do not belong together; a tolerance that is no number;
            a model that gives NaN for the text as it is.

    >>> class Leaky(nn.Module):
    ...     def forward(self, input_ids, media):
    ...         return media.mean((1, 2))[:, None, None].expand(*input_ids.shape, 3)
    >>> batch = {"input_ids": torch.tensor([[5, 9, 5]]), "media": torch.randn(1, 1, 4)}
    >>> audit(Leaky(), batch, media_token_id=9).leaks[0].positions  # the text before the medium
    (0,)
    """
    if not 0 <= tolerance < float("inf"):
        raise InvalidArgument("tolerance", expected="a finite number, 0 or more", got=tolerance)
    name = _media_argument(batch, media)
    tensor = batch[name]
    if not isinstance(tensor, Tensor) or not torch.is_floating_point(tensor):
        raise InvalidType(name, expected="a floating-point tensor", got=getattr(tensor, "dtype", type(tensor).__name__))
    token = _media_token(model) if media_token_id is None else media_token_id
    found = find_media(batch, tensor, media_token_id=token, tokens_per_medium=tokens_per_medium, media_axis=media_axis)

    real = real_text(batch)
    with evaluating(model):
        logits = _logits(model, batch)
        apart = _difference(_logits(model, batch), logits)[real]
        floor = apart.max().item() if len(apart) else 0.0
        if floor == float("inf"):
            raise InvalidArgument("model", expected="logits that are numbers at real text", got="NaN")
        changes = []
        for medium in found:
            changed = tensor.clone()
            changed[medium.where] = _noise(tensor, tensor[medium.where].shape, generator)
            changes.append(_difference(_logits(model, {**batch, name: changed}), logits))
    expected = torch.stack([medium.should_move for medium in found])
    return Audit(tuple(found), torch.stack(changes), expected, real, max(tolerance, floor))


def _media_argument(batch: Mapping[str, Any], name: str | None) -> str:
    names = ("media", "pixel_values", "images", "input_features") if name is None else (name,)
    found = next((known for known in names if batch.get(known) is not None), None)
    if found is None or "input_ids" not in batch:
        raise InvalidArgument(
            "batch", expected=f"input_ids and media under {' or '.join(map(repr, names))}", got=f"{sorted(batch)}"
        )
    return found


def _media_token(model: nn.Module) -> int | None:
    for holder in (model, getattr(model, "config", None)):
        for name in ("media_token_id", "image_token_id", "image_token_index"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


def _logits(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    logits = getattr(output, "logits", output)
    shape = tuple(batch["input_ids"].shape)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise InvalidArgument("model", expected=f"logits [B, T, V] with [B, T] = {shape}", got=got)
    return logits


def _difference(one: Tensor, other: Tensor) -> Float[Tensor, "B T"]:
    """The greatest change of a logit at each position; infinite where one of the two is NaN."""
    change = (one.float() - other.float()).abs().nan_to_num(nan=torch.inf)
    return change.masked_fill(one == other, 0.0).amax(-1)  # an infinity less itself is NaN


def _noise(like: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    values = like[like.isfinite()].double()
    spread = values.std().item() if values.numel() > 1 else 0.0
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + values.mean().item()
    return noise.to(like)


def _count(findings: Sequence[Finding]) -> int:
    return sum(len(finding.positions) for finding in findings)


def _medium_in_words(finding: Finding) -> str:
    medium = finding.medium
    place = "without a place in the text" if medium.position is None else f"at position {medium.position}"
    return f"medium {medium.index} of row {medium.row}, {place},"


def _positions_in_words(finding: Finding) -> str:
    """For example `positions 0-2, 5 of row 1`; the row only if it is not the medium's own."""
    runs = [list(run) for _, run in groupby(enumerate(finding.positions), lambda pair: pair[1] - pair[0])]
    spans = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
    row = "" if finding.row == finding.medium.row else f" of row {finding.row}"
    return f"position{'s' if len(finding.positions) > 1 else ''} {', '.join(spans)}{row}"
