"""Weights of other people's checkpoints: read from files, renamed, and put into modules, all of them or none."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.weights import Ignored, load_strictly, read_file, tensors_in

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training scripts save the weights, beside optimizer and epoch."""

# Of sets of weights that fit equally well: averages are taken where they are asked for only, a student before them.
_ASKED_FOR = (r"student", r"ema|averag|momentum|target|swa|shadow|encoder_k\b")
# Parts that only training uses. Other parts that a model lacks, such as register tokens, change what it computes.
_TRAINING_ONLY = re.compile(
    r"(decoder|projector|projection_head|predictor|prototypes|queue|(dino|ibot|contrastive)_head)(_\w+)?(\.|$)"
    r"|mask_token$|n_averaged$|(.*\.)?position_ids$"
)
_POSITIONS = re.compile(r"(.*[._])?pos(ition)?(al)?(s|_?embed(ding)?s?)(\.weight)?$")


def read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in one that `torch.load` reads with `weights_only=True`.

    Weights that a training script saved under "state_dict", "model", "model_state_dict" or "module" are found there.

    Raises:
        InvalidArgument: no such file, a damaged one, or one that holds anything but weights.
    """
    return weights_in(read_file(checkpoint), str(checkpoint))


def weights_in(checkpoint: Any, where: str = "what was given", *, argument: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors in what a training script saved: under one of `WRAPPERS`, or at the top.

    Raises:
        InvalidArgument: anything but tensors by name.
    """
    for wrapper in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        got = "nothing" if checkpoint == {} else f"a {type(checkpoint).__name__}"
        raise InvalidArgument(argument, expected="tensors by name", got=f"{got} in {where}")
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            kind = (
                f"class {value.name}, which weights_only=True leaves out" if isinstance(value, Ignored) else type(value)
            )
            got = f"{name!r} of {kind if isinstance(kind, str) else f'type {kind.__name__}'} in {where}"
            raise InvalidArgument(argument, expected="tensors by name", got=got, hint="Save module.state_dict().")
    return dict(checkpoint)


def count_numbered(names: Iterable[str], pattern: str, *, argument: str = "checkpoint") -> int:
    """How many numbers, from 0 on without a gap, the first group of `pattern` finds in these names.

    Raises:
        InvalidArgument: numbers that do not count from 0.
    """
    found = {match[1] for name in names if (match := re.search(pattern, name))}
    if found != {str(number) for number in range(len(found))}:
        got = ", ".join(sorted(number[:20] for number in found)[-3:])
        raise InvalidArgument(
            argument, expected=f"names with {pattern} numbered from 0 to {len(found) - 1}", got=f"numbers up to {got}"
        )
    return len(found)


class Renamed(dict[str, Tensor]):
    """Weights by their names in narrows; `names` says under which they came.

    Args:
        weights: by the names they have in a checkpoint.
        rules: patterns and what they become, applied to every name one after the other.
        argument: what messages call the checkpoint.

    Raises:
        InvalidArgument: two weights that differ get the same name.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]] = (), *, argument: str = "checkpoint"
    ) -> None:
        super().__init__()
        self.argument, self.names = argument, dict[str, str]()
        for name, value in weights.items():
            ours, theirs = name, weights.names[name] if isinstance(weights, Renamed) else name
            for pattern, replacement in rules:
                ours = re.sub(pattern, replacement, ours)
            if ours in self and not torch.equal(self[ours], value):
                both = f"{self.names[ours]!r} and {theirs!r}, which differ"
                raise InvalidArgument(argument, expected=f"one weight for {ours}", got=both)
            self[ours], self.names[ours] = value, theirs

    def without(self, names: Iterable[str]) -> "Renamed":
        """All but these."""
        left = self.under("")
        for name in names:
            left.pop(name, None)
        return left

    def under(self, prefix: str) -> "Renamed":
        """Those whose names begin with `prefix`, without it."""
        inside = {name: value for name, value in self.items() if name.startswith(prefix)}
        found = Renamed({name.removeprefix(prefix): value for name, value in inside.items()}, argument=self.argument)
        found.names = {name.removeprefix(prefix): self.names[name] for name in inside}
        return found


def fill(module: nn.Module, weights: Renamed) -> None:
    """Put a copy of every weight into `module`, with the dtype and the device it has.

    Raises:
        InvalidArgument: names every weight that is missing, left over or of another shape; nothing was put anywhere.
    """
    load_strictly(module, weights, argument=weights.argument, names=weights.names, assign=True)


def find_weights(
    model: nn.Module, checkpoint: Mapping[Any, Any], *, key: str | None = None, where: str = "the checkpoint"
) -> tuple[Renamed, list[str]]:
    """The weights of a model in whatever a training script saved, under the names of the model, and what to say of it.

    Keys of nested dictionaries and prefixes of names are one and the same here: the weights stand where the most names
    of the model are found, be it "state_dict.model._orig_mod", "teacher.backbone" or "module.base_encoder". Of several
    such places an average (EMA, momentum) is taken only where `key` asks for it, and a student only beside no teacher.

    Args:
        model: whose parameters and buffers are looked for.
        checkpoint: what `read_file` gives.
        key: a part of the path that they stand under: "model_ema", "teacher", "module.momentum_encoder".
        where: the file, for messages.

    Raises:
        InvalidArgument: no tensors, none of the model's, an unknown key, or several places to choose from.
    """
    tensors, places, expected = tensors_in(checkpoint), Counter[str](), model.state_dict().keys()
    for path in tensors:
        ends = [0, *(match.end() for match in re.finditer(r"\.", path))]
        places.update(path[:end] for end in ends if path[end:] in expected)
    if not tensors:
        objects = sorted({value.name for value in checkpoint.values() if isinstance(value, Ignored)})
        got = f"{'objects of ' + ', '.join(objects[:3]) if objects else 'none'} in {where}"
        raise InvalidArgument("checkpoint", expected="tensors by name", got=got, hint="Save model.state_dict().")
    if 2 * max(places.values(), default=0) < len(expected):
        wanted, first = (", ".join(list(names)[:3]) for names in (expected, tensors))
        raise InvalidArgument(
            "checkpoint",
            expected=f"the weights of a {type(model).__name__} of this size: {wanted}, ...",
            got=f"{first}, ... in {where}",
        )
    likely = {place: count for place, count in places.items() if 2 * count > max(places.values())}
    if key is not None:
        named = {place: count for place, count in likely.items() if f".{key}." in f".{place}"}
        if not named:
            known = ", ".join(repr(place.rstrip(".")) for place in likely) or "nothing that fits the model"
            raise InvalidArgument("checkpoint_key", expected=f"where weights are in {where}: {known}", got=repr(key))
        likely = named
    ranked = sorted(likely, key=lambda place: (_rank(place), -likely[place], len(place)))
    place = ranked[0]
    level = [other for other in ranked[1:] if (_rank(other), likely[other]) == (_rank(place), likely[place])]
    others = ", ".join(repr(other.rstrip(".")) for other in ranked[1:])
    if level:
        raise InvalidArgument(
            "checkpoint_key", expected=f"one of {place.rstrip('.')!r}, {others}: all fit the model", got=repr(key)
        )
    notes = [f"Weights are those under {place.rstrip('.')!r}"] if place.rstrip(".") not in ("", *WRAPPERS) else []
    if others:
        notes = [f"Weights are those under {place.rstrip('.')!r}; checkpoint_key may name {others} too"]
    return Renamed(tensors).under(place), notes


def _rank(place: str) -> int:
    return max((number for number, words in enumerate(_ASKED_FOR, start=1) if re.search(words, place)), default=0)


def fit_weights(weights: Renamed, expected: Mapping[str, Tensor], grid: tuple[int, int] | None) -> list[str]:
    """Change weights of the same network into those of a model of another image size; says what was changed.

    Position embeddings that were learned on another grid are interpolated, and parts that only training uses (a
    decoder, a projector, a mask token) are left out.

    Args:
        weights: of the checkpoint, changed here.
        expected: the model's own state dict.
        grid: `(height, width)` of the model's patches; None where it has none.
    """
    notes = []
    for name, own in expected.items():
        value = weights.get(name)
        if grid is None or value is None or value.shape == own.shape or not _POSITIONS.match(name):
            continue
        prefix = own.shape[-2] - grid[0] * grid[1] if own.ndim > 1 else -1
        side = isqrt(max(0, value.shape[-2] - prefix)) if value.ndim == own.ndim else 0
        if 0 <= prefix <= 16 and side and side**2 == value.shape[-2] - prefix and value.shape[-1] == own.shape[-1]:
            weights[name] = _resampled(value, prefix, side, grid)
            notes.append(f"Positions of a grid of {side} x {side} are interpolated to {grid[0]} x {grid[1]}")
    left = [name for name in weights if name not in expected and _TRAINING_ONLY.match(name)]
    for name in left:
        del weights[name]
    if left:
        parts = sorted({name.partition(".")[0] for name in left})
        notes.append(f"Left out, since only training uses it: {', '.join(parts[:4])}")
    return notes


def _resampled(positions: Tensor, prefix: int, side: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings `[..., prefix + side * side, D]` on another grid, those of prefix tokens as they are."""
    before, patches = positions[..., :prefix, :], positions[..., prefix:, :]
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    patches = image.permute(0, 2, 3, 1).reshape(*positions.shape[:-2], -1, positions.shape[-1]).to(positions.dtype)
    return torch.cat((before, patches), dim=-2)
