"""A causality check of models that read media: which text positions depend on which medium, and which must not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.adapters.flamingo.places import Medium, find_media, real_text
from narrows.costs import evaluating
from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.routing import Routing
from narrows.validation import check_mask, checked

MEDIA = ("media", "pixel_values", "images", "input_features", "pixel_values_videos", "image_patches")
ROUNDING = 1e3  # Changes beyond so many units of rounding of the largest logit are none of it.
CONTROLS = 4
_NOT_CAUSAL = (
    "the language model itself reads text that follows: text before a medium moves when text behind it is changed; "
    "prefix= declares what means to read in both directions"
)


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
    """The change of the logits by each medium. `str()` of it is the report, `verdict` its short form.

    Args:
        media: the media that were changed, one after another.
        change: `[media, B, T]`, the greatest change of a logit at each position when that medium was changed.
        expected: `[media, B, T]`, True where logits should change: at real text from the medium on, in its own row and
            document.
        judged: `[B, T]`, True at real text; padding is not judged.
        threshold: changes up to this are no leak: the tolerance, or what the model moves by itself.
        allowed: `[media, B, T]`, True where logits may change besides: in a prefix that reads in both directions.
        within_reach: `[media, B, T]`, False where text depends on no token at the medium's place, so that it cannot
            depend on the medium (sliding windows).
        undecided: why some of it cannot be told.
    """

    media: tuple[Medium, ...]
    change: Float[Tensor, "media B T"]
    expected: Bool[Tensor, "media B T"]
    judged: Bool[Tensor, "B T"]
    threshold: float
    allowed: Bool[Tensor, "media B T"]
    within_reach: Bool[Tensor, "media B T"]
    undecided: tuple[str, ...] = ()

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """Positions that changed and must not."""
        return self._findings((self.change > self.threshold) & ~self.expected & ~self.allowed & self.judged)

    @property
    def blind(self) -> tuple[Finding, ...]:
        """Positions that should change and did not."""
        return self._findings((self.change == 0) & self.expected & self.within_reach & self.judged)

    @property
    def passed(self) -> bool:
        """Whether there is neither a leak nor a blind position, and nothing that cannot be told."""
        return self.verdict == "passes"

    @property
    def verdict(self) -> str:
        """One of "passes", "leaks", "blind" and "cannot tell, because ..."."""
        if self.leaks:
            return "leaks"
        if self.undecided:
            return f"cannot tell, because {'; '.join(self.undecided)}"
        return "blind" if self.blind else "passes"

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
        lines += [f"cannot tell, because {reason}" for reason in self.undecided]
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
    tokens_per_medium: int | None = None,
    media_axis: int | None = None,
    prefix: Bool[Tensor, "B T"] | None = None,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Audit:
    """Change each medium of a batch in turn and see which logits change: text must not depend on later media.

    Text before a medium, text of another row or of another packed document must not move by one bit; neither may
    anything where a medium is masked, or has no place in the text. Text from the medium on should move: at least
    through the language model's own attention, whichever media the model lets it read directly.

    The model is anything called as `model(**batch)` that gives logits `[B, T, V]` for `input_ids` `[B, T]`: a
    `narrows.Flamingo`, or a vision-language model of transformers. It runs once for each medium and twice more, in
    evaluation mode; what two equal runs differ by is no change. Where text moves that must not, the text behind the
    medium is changed in its place: what moves by that too is the model's own doing, its rounding (in a mixture of
    experts that of a token depends on the others) or a language model that reads in both directions. Where text should
    move and does not, a token beside the medium is changed: what does not move by that either is out of reach.

    Args:
        model: the model.
        batch: its arguments. `attention_mask` says which text is real, `media_mask` `[B, M]` or `[B, M, N]` which media
            are, `position_ids` that fall where a new document begins in the row.
        media: which argument holds the media; by default the first that is there of `media`, `pixel_values`, `images`,
            `input_features`, `pixel_values_videos`, `image_patches`.
        media_token_id: the token that stands for a medium in the text; by default `batch["media_locations"]` where it
            is given, or what the model or its config calls `media_token_id`, `image_token_id` or `image_token_index`.
        tokens_per_medium: how many such tokens in a row one medium takes (LLaVA: one for each patch). None: told by
            their number and the media's.
        media_axis: the axis that counts media. 1: `[B, M, ...]`. 0: those of all rows one after another, each an equal
            part of it. None: told by the shape, and by `image_grid_thw` where media have patches of different numbers.
        prefix: `[B, T]`, True at text that means to read in both directions (PaliGemma): media in it may move all of
            it.
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
    tensors = batch[name] if isinstance(batch[name], list | tuple) else [batch[name]]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not torch.is_floating_point(tensor):
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise InvalidType(name, expected="a floating-point tensor", got=got)
    token = _media_token(model) if media_token_id is None else media_token_id
    found = find_media(batch, name, media_token_id=token, tokens_per_medium=tokens_per_medium, media_axis=media_axis)
    found = [medium for medium in found if medium.position is not None or not _is_empty(batch[name], medium)]
    real = real_text(batch)
    expected = torch.stack([medium.should_move for medium in found])
    allowed = torch.zeros_like(expected)
    if prefix is not None:
        check_mask("prefix", prefix, tuple(real.shape), layout="[B, T]")
        for index, medium in enumerate(found):
            if medium.position is not None and prefix[medium.row, medium.position]:
                allowed[index, medium.row] = prefix[medium.row]
    trial = _Trial(model, batch, name, token, generator)
    with evaluating(model):
        logits = _logits(model, batch)
        apart = _difference(_logits(model, batch), logits)[real]
        floor = apart.max().item() if len(apart) else 0.0
        if floor == float("inf"):
            raise InvalidArgument("model", expected="logits that are numbers at real text", got="NaN")
        changes = torch.stack([trial.by_medium(medium, logits) for medium in found])
        threshold, reach = max(tolerance, floor), torch.ones_like(expected)
        rounding = ROUNDING * torch.finfo(logits.dtype).eps * logits[real].float().abs().nan_to_num(posinf=0.0).max()
        for index, medium in enumerate(found):
            wrong = (changes[index] > threshold) & ~expected[index] & ~allowed[index] & real
            if wrong.any() and medium.position is not None:
                own = trial.by_later_text(medium, logits)
                threshold = max(threshold, 2 * own.where(own <= rounding, 0.0)[wrong].max().item())
                before = torch.zeros_like(wrong)
                before[medium.row, : medium.position] = True
                excused = wrong & before & (own > rounding)
                allowed[index] |= excused
                trial.undecided += [_NOT_CAUSAL] if excused.any() else []
            if (expected[index] & real & (changes[index] == 0)).any() and (changes[index] != 0).any():
                reach[index] = trial.reach(medium, found, logits)
    undecided = tuple(dict.fromkeys(trial.undecided))
    return Audit(tuple(found), changes, expected, real, threshold, allowed, reach, undecided)


class _Trial:
    """Runs of a model on a batch with something changed in it; `undecided` collects why one could not be had."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        name: str,
        token: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.batch, self.name, self.generator = model, batch, name, generator
        ids, locations = batch["input_ids"], batch.get("media_locations")
        taken = locations.bool() if locations is not None else torch.zeros_like(ids, dtype=torch.bool)
        self.text = real_text(batch) & ~(taken if token is None else taken | (ids == token))
        self.undecided: list[str] = []

    def by_medium(self, medium: Medium, logits: Tensor) -> Float[Tensor, "B T"]:
        """What a medium moves when it is changed to noise."""
        media = self.batch[self.name]
        if isinstance(media, Tensor):
            changed: Any = media.clone()
            changed[medium.where] = _noise(media, media[medium.where].shape, self.generator)
        else:
            changed = list(media)
            changed[medium.row] = _noise(media[medium.row], media[medium.row].shape, self.generator)
        where = f"with medium {medium.index} of row {medium.row} changed"
        moved = self._moved({self.name: changed}, logits, where)
        return medium.should_move * torch.finfo(torch.float32).tiny if moved is None else moved

    def by_later_text(self, medium: Medium, logits: Tensor) -> Float[Tensor, "B T"]:
        """By how much text that must not move does so when text behind the medium is changed: the model's own doing."""
        assert medium.position is not None
        moved, positions = torch.zeros(logits.shape[:-1], device=logits.device), torch.arange(logits.shape[1])
        later = self.text & medium.should_move & (positions >= medium.position).to(logits.device)
        for turn in range(CONTROLS):
            ids = torch.where(later, self._other(self.batch["input_ids"], turn), self.batch["input_ids"])
            one = self._moved({"input_ids": ids}, logits, "with text behind a medium changed")
            moved = moved if one is None else torch.maximum(moved, one)
        return moved

    def reach(self, medium: Medium, media: Sequence[Medium], logits: Tensor) -> Bool[Tensor, "B T"]:
        """Which text depends on a token right before the medium, or right behind it where none stands before."""
        ids, places = self.batch["input_ids"], {(one.row, one.position) for one in media}
        assert medium.position is not None
        row, length = medium.row, ids.shape[1]
        beside = [*range(medium.position - 1, -1, -1), *range(medium.position + 1, length)]
        text = [position for position in beside if (row, position) not in places and self.text[row, position]]
        if not text:
            return torch.ones_like(self.text)
        changed = ids.clone()
        changed[row, text[0]] = self._other(ids)[row, text[0]]
        moved = self._moved({"input_ids": changed}, logits, "with a token changed")
        return torch.zeros_like(self.text) if moved is None else moved > 0

    def _other(self, ids: Tensor, turn: int = 0) -> Tensor:
        """Another token of the same text for each."""
        text = ids[self.text].unique()
        if len(text) < 2:
            return torch.where(ids > 1, ids - 1, ids + 1)
        places = torch.searchsorted(text, ids).clamp(max=len(text) - 1)
        return text[(places + 1 + turn % (len(text) - 1)) % len(text)]

    def _moved(self, changed: Mapping[str, Any], logits: Tensor, where: str) -> Float[Tensor, "B T"] | None:
        """The change of logits; None where the model fails."""
        try:
            return _difference(_logits(self.model, {**self.batch, **changed}), logits)
        except NarrowsError:
            raise
        except Exception as error:  # models fail in ways of their own
            reason = str(error).partition("\n")[0]
            self.undecided.append(f"the model raises {type(error).__name__} {where}: {reason}")
            return None


def _is_empty(media: Any, medium: Medium) -> bool:
    """Whether a medium without a place in the text is one number all over: padding, as models know it by that."""
    part = media[medium.where] if isinstance(media, Tensor) else media[medium.row]
    return bool((part == part.flatten()[:1]).all())


def _media_argument(batch: Mapping[str, Any], name: str | None) -> str:
    names = MEDIA if name is None else (name,)
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
