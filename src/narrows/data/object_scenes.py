"""Scenes and clips of coloured shapes with the mask of every object, drawn without a download."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from narrows.data.images import IGNORED, ImageData, ImageSet, normalised
from narrows.data.positions import keys, uniforms
from narrows.data.scenes import SegmentedDigits
from narrows.data.tabletop import TabletopScenes
from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_positive

SHAPES = ("square", "disc", "triangle", "cross", "ring")
HUES: Mapping[str, int] = MappingProxyType(
    {"red": 0, "orange": 32, "yellow": 58, "green": 120, "cyan": 178, "blue": 225, "purple": 275, "pink": 325}
)
"""Hue in degrees of each colour that objects have, by its name."""
COLOURS = tuple(HUES)
BACKGROUNDS = ("plain", "waves")

_CANDIDATES, _WAVES = 12, 3
_PER_SCENE, _PER_OBJECT = 1 + 3 + 7 * _WAVES + len(HUES), 9 + 2 * _CANDIDATES


class ObjectScene(NamedTuple):
    """Rendered scenes, or clips of T frames, with every object's mask, shape, colour and place.

    Args:
        images: `[B, 3, size, size]`, or `[B, T, 3, size, size]`.
        masks: `[B, size, size]`, or `[B, T, size, size]`: which object is seen in a pixel, counted from 1; 0 is the
            background.
        shapes: `[B, K]`, indices into `SHAPES`; `IGNORED` where a scene has fewer than K objects.
        colours: `[B, K]`, indices into `COLOURS`; `IGNORED` likewise.
        centres: `[B, K, 2]`, or `[B, T, K, 2]`: x and y as shares of the canvas, from the top left corner. In clips
            they may lie outside it.
    """

    images: UInt8[Tensor, "B *T 3 size size"]
    masks: Int[Tensor, "B *T size size"]
    shapes: Int[Tensor, "B K"]
    colours: Int[Tensor, "B K"]
    centres: Float[Tensor, "B *T K 2"]


class SpriteScenes(ImageSet):
    """Coloured shapes on a plain or textured background; the label is the object each pixel belongs to.

    Scene i is a pure function of (seed, split, epoch, i) and the same on every machine. Training scenes are drawn anew
    every epoch; held-out scenes never change. Later objects cover earlier ones; no two of a scene have one colour.

    With `frames`, clips: every object moves evenly through a place of its own at a time of its own, and turns. Objects
    enter, leave and pass in front of each other. An object keeps its number throughout.

    Args:
        split: "train" or "held_out".
        size: side of the canvas in pixels.
        objects: least and greatest number of objects in a scene, eight at most.
        radius: least and greatest radius of an object, as shares of the canvas.
        shapes: which of `SHAPES` occur.
        background: "plain", one grey, or "waves", waves of colour.
        apart: distance that two centres keep, as a share of the sum of their radii; of twelve random places the first
            that keeps it is taken, or else the one that comes closest to it.
        cells: objects stand in the middles of cells of a grid of so many rows and columns, one in a cell.
        frames: T, of a clip; None for images.
        length: scenes in an epoch; by default 6400 for training and 320 held out.
        seed: of the scenes.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 32,
        objects: tuple[int, int] = (2, 4),
        radius: tuple[float, float] = (0.12, 0.2),
        shapes: Sequence[str] = SHAPES[:3],
        background: str = "plain",
        apart: float = 0.8,
        cells: int | None = None,
        frames: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("split", split, ("train", "held_out"))
        check_choice("background", background, BACKGROUNDS)
        for shape in shapes:
            check_choice("shapes", shape, SHAPES)
        if size < 16:
            raise InvalidArgument("size", expected="at least 16 pixels, so that shapes can be told", got=size)
        if not shapes:
            raise InvalidArgument("shapes", expected=f"one at least of {', '.join(SHAPES)}", got="none")
        if not 0 <= objects[0] <= objects[1] <= len(HUES) or objects[1] < 1:
            raise InvalidArgument("objects", expected=f"0 <= least <= greatest, 1 to {len(HUES)}", got=objects)
        if not 0 < radius[0] <= radius[1] <= 0.5:
            raise InvalidArgument("radius", expected="0 < least <= greatest <= 0.5", got=radius)
        if cells is not None and (cells**2 < objects[1] or frames is not None):
            expected = f"a grid with a cell for each of {objects[1]} objects, and no frames"
            raise InvalidArgument("cells", expected=expected, got=f"{cells} x {cells} cells, frames={frames}")
        length = (6400 if split == "train" else 320) if length is None else length
        check_positive(length=length, frames=1 if frames is None else frames)
        self.split, self.size, self.objects, self.radius, self.seed = split, size, objects, radius, seed
        self.shapes, self.background, self.apart = tuple(shapes), background, apart
        self.cells, self.frames, self._length = cells, frames, int(length)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`scene 17`, for instance."""
        return f"scene {index}"

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B *T 3 H W"], Int[Tensor, "B *T H W"]]:
        """Normalised images or clips, and the number of the object in each pixel, 0 on the background."""
        scenes = self.render(indices, epoch)
        return normalised(scenes.images), scenes.masks

    def render(self, indices: Sequence[int], epoch: int = 0) -> ObjectScene:
        """These scenes as `ObjectScene`."""
        training = self.split == "train"
        key = keys(self.seed, 7, int(training), epoch if training else 0, np.asarray(indices, np.uint64))
        least, most = self.objects
        random = torch.from_numpy(uniforms(key, _PER_SCENE + most * _PER_OBJECT))
        ours, theirs = random[:, :_PER_SCENE], random[:, _PER_SCENE:].unflatten(1, (most, _PER_OBJECT))
        there = torch.arange(most) < (least + ours[:, :1] * (most - least + 1)).long()
        shapes = torch.tensor([SHAPES.index(shape) for shape in self.shapes])[
            (theirs[..., 0] * len(self.shapes)).long()
        ]
        colours = ours[:, -len(HUES) :].argsort(1)[:, :most]
        radii = self.radius[0] + theirs[..., 1] * (self.radius[1] - self.radius[0])
        times = torch.arange(self.frames or 1)
        if self.cells is None:
            places = self._places(theirs[..., 9:], radii)
        else:
            cell = torch.from_numpy(uniforms(keys(self.seed, 8, key), self.cells**2)).argsort(1)[:, :most]
            places = (torch.stack((cell % self.cells, cell // self.cells), -1) + 0.5) / self.cells
        centres = self._paths(places, theirs, times)
        angles = (theirs[..., 2] + (theirs[..., 3] - 0.5) * times.view(-1, 1, 1) / (self.frames or 1)) * 2 * torch.pi
        paint = _rgb(
            torch.tensor(list(HUES.values()))[colours] + (theirs[..., 4] - 0.5) * 20,
            saturation=0.75 + 0.25 * theirs[..., 5],
            value=0.7 + 0.3 * theirs[..., 6],
        )
        canvas = self._canvas(ours[:, 1:]).expand(len(times), -1, -1, -1, -1)
        masks = torch.zeros(len(times), len(key), self.size, self.size, dtype=torch.long)
        for number in range(most):
            cover = self._cover(shapes[:, number], centres[:, :, number], angles[:, :, number], radii[:, number])
            cover = cover * there[:, number].view(-1, 1, 1)
            canvas = canvas.lerp(paint[:, number, :, None, None], cover.unsqueeze(2))
            masks = torch.where(cover > 0.5, number + 1, masks)
        images = (canvas * 255).round().clamp(0, 255).to(torch.uint8)
        timed = [each.transpose(0, 1) if self.frames else each[0] for each in (images, masks, centres)]
        shapes, colours = (each.where(there, IGNORED) for each in (shapes, colours))
        return ObjectScene(timed[0], timed[1], shapes, colours, timed[2])

    def _places(self, random: Float[Tensor, "B K twice"], radii: Float[Tensor, "B K"]) -> Float[Tensor, "B K 2"]:
        """A place for each object, apart from those before it."""
        room = radii[..., None, None]
        candidates = room + random.unflatten(2, (_CANDIDATES, 2)) * (1 - 2 * room)
        order = torch.arange(_CANDIDATES, 0, -1)
        chosen = candidates[:, :1, 0]
        for number in range(1, random.shape[1]):
            distance = torch.cdist(candidates[:, number], chosen)
            kept = (distance / (radii[:, None, :number] + radii[:, number, None, None])).amin(2)
            best = torch.where(kept >= self.apart, self.apart + order, kept).argmax(1)
            place = candidates[torch.arange(len(best)), number, best]
            chosen = torch.cat((chosen, place.unsqueeze(1)), 1)
        return chosen

    def _paths(
        self, places: Float[Tensor, "B K 2"], random: Float[Tensor, "B K numbers"], times: Int[Tensor, "T"]
    ) -> Float[Tensor, "T B K 2"]:
        """Where objects are at each time: still, or moving through their place at a time in the clip."""
        if self.frames is None:
            return places.unsqueeze(0)
        direction = random[..., 7] * 2 * torch.pi
        travel = torch.stack((direction.cos(), direction.sin()), -1) * (0.3 + 0.9 * random[..., 8:9])
        elapsed = (times.view(-1, 1, 1, 1) + 0.5) / self.frames - random[..., 3:4]
        return places + travel * elapsed

    def _canvas(self, random: Float[Tensor, "B numbers"]) -> Float[Tensor, "B 3 H W"]:
        """The background."""
        grey = (0.2 + 0.4 * random[:, 0]).view(-1, 1, 1, 1)
        canvas = grey.expand(-1, 3, self.size, self.size)
        if self.background == "plain":
            return canvas
        x, y = self._pixels
        for wave in random[:, 3 : 3 + 7 * _WAVES].unflatten(1, (_WAVES, 7)).unbind(1):
            angle, cycles, phase, strength = (each.view(-1, 1, 1, 1) for each in wave[:, :4].T)
            along = x * torch.cos(angle * 2 * torch.pi) + y * torch.sin(angle * 2 * torch.pi)
            colour = (wave[:, 4:] - 0.5).view(-1, 3, 1, 1) * (0.2 + 0.25 * strength)
            canvas = canvas + colour * torch.sin(2 * torch.pi * (along * (1 + 2 * cycles) + phase))
        return canvas.clamp(0, 1)

    def _cover(
        self,
        shapes: Int[Tensor, "B"],
        centres: Float[Tensor, "T B 2"],
        angles: Float[Tensor, "T B"],
        radii: Float[Tensor, "B"],
    ) -> Float[Tensor, "T B H W"]:
        """How much of each pixel an object covers, from its signed distance."""
        x, y = self._pixels
        centres, angles = centres[..., None, None], angles[..., None, None]
        across, down = x - centres[:, :, 0], y - centres[:, :, 1]
        size = radii.view(-1, 1, 1)
        u = (across * angles.cos() + down * angles.sin()) / size
        v = (down * angles.cos() - across * angles.sin()) / size
        far, wide, high = torch.hypot(u, v), u.abs(), v.abs()
        distance = {
            "square": torch.maximum(wide, high) - 0.76,
            "disc": far - 0.86,
            "triangle": torch.maximum(v, wide * 0.75**0.5 - v / 2) - 0.58,
            "cross": torch.minimum(torch.maximum(wide - 1, high - 0.36), torch.maximum(high - 1, wide - 0.36)),
            "ring": (far - 0.7).abs() - 0.26,
        }
        every = torch.stack([distance[shape] for shape in SHAPES])
        own = every[shapes, :, torch.arange(len(shapes))].transpose(0, 1)
        return (0.5 - own * size * self.size).clamp(0, 1)

    @property
    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Centres of the pixels as shares of the canvas: x `[size]` and y `[size, 1]`."""
        centres = (torch.arange(self.size) + 0.5) / self.size
        return centres, centres.unsqueeze(1)


class DigitObjects(SegmentedDigits):
    """Handwritten digits on a canvas with clutter, as colour images; the label is the object each pixel belongs to.

    Arguments, canvas and splits are those of `SegmentedDigits`.
    """

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B H W"]]:
        """Normalised images and the number of the digit in each pixel, 0 on the background."""
        scenes = self.render(indices, epoch)
        return normalised(scenes.images.expand(-1, 3, -1, -1)), scenes.objects


class _Kind(NamedTuple):
    images: type[SpriteScenes] | type[DigitObjects] | type[TabletopScenes]
    image_size: int
    options: Mapping[str, Any] = MappingProxyType({})


OBJECT_SCENES: Mapping[str, _Kind] = MappingProxyType(
    {
        "sprites": _Kind(SpriteScenes, 32),
        "textured_sprites": _Kind(SpriteScenes, 32, {"background": "waves"}),
        "crowded_sprites": _Kind(
            SpriteScenes, 64, {"objects": (2, 6), "apart": 0.5, "shapes": SHAPES, "background": "waves"}
        ),
        "sprite_grid": _Kind(SpriteScenes, 32, {"objects": (2, 3), "cells": 3, "radius": (0.12, 0.15)}),
        "moving_sprites": _Kind(SpriteScenes, 32, {"frames": 8}),
        "digit_objects": _Kind(DigitObjects, 64),
        "tabletop": _Kind(TabletopScenes, 64),
        "moving_tabletop": _Kind(TabletopScenes, 64, {"frames": 8}),
    }
)
"""Scenes with the masks of their objects, by name: what draws them, their size, and its options."""


def load_object_scenes(
    name: str = "sprites",
    *,
    image_size: int | None = None,
    frames: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Training and held-out scenes with the masks of their objects.

    Args:
        name: one of `OBJECT_SCENES`.
        image_size: side of the square images; by default 32 for scenes of two to four sprites, 64 for others.
        frames: T, of clips; by default 8 for "moving_sprites" and "moving_tabletop", and images for others.
        length: training scenes in an epoch.
        seed: of the training scenes. Held-out scenes do not depend on it.

    Raises:
        InvalidArgument: no such scenes, scenes that do not move where frames are asked for, or a size too small.
        MissingExtra: tabletop scenes without pybullet.
    """
    check_choice("data", name, tuple(OBJECT_SCENES))
    kind = OBJECT_SCENES[name]
    options: dict[str, Any] = {"size": kind.image_size if image_size is None else image_size, **kind.options}
    if frames is not None:
        if kind.images is DigitObjects or "cells" in options:
            raise InvalidArgument("frames", expected=f"None for {name!r}, which does not move", got=frames)
        options["frames"] = frames
    held_out: ImageSet = kind.images("held_out", **options)
    return ImageData(
        name=name,
        train=kind.images("train", length=length, seed=seed, **options),
        held_out=held_out,
        test=held_out,
        classes=(),
        image_size=options["size"],
        channels=3,
        held_out_rule="scenes of numbers of their own",
    )


def _rgb(
    hue: Float[Tensor, "B K"], *, saturation: Float[Tensor, "B K"], value: Float[Tensor, "B K"]
) -> Float[Tensor, "B K 3"]:
    """Colours of hues in degrees."""
    sector = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    fall = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * fall)
