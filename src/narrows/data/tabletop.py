"""Tabletop scenes and clips with true masks, rendered from the objects that come with pybullet."""

import colorsys
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from narrows.data.images import ImageSet, normalised
from narrows.data.positions import keys, uniforms
from narrows.errors import InvalidArgument, MissingExtra
from narrows.validation import check_choice, check_positive

_MODELS, _HELD_OUT = 1000, 800  # models of pybullet_data; those from here on are in held-out scenes alone
_CELLS, _REACH = 3, 0.45  # objects stand in cells of a square on the table, as wide as this in metres
_PER_SCENE, _PER_OBJECT = 6, 12
_STEPS, _STEP = 16, 1 / 240  # of the simulation in a frame


class Rendered(NamedTuple):
    """Scenes, or clips of T frames, and the object of each pixel.

    Args:
        images: `[B, 3, size, size]`, or `[B, T, 3, size, size]`.
        masks: `[B, size, size]`, or `[B, T, size, size]`: which object is seen, counted from 1; 0 is the table.
    """

    images: UInt8[Tensor, "B *T 3 size size"]
    masks: Int[Tensor, "B *T size size"]


class TabletopScenes(ImageSet):
    """Objects of many shapes on a table, seen from above at an angle, with shadows, like MOVi-A and MOVi-B.

    Scene i is a pure function of (seed, split, epoch, i). Shapes are 1,000 that come with pybullet (zlib licence), of
    which 200 occur in held-out scenes alone; a software renderer draws them, without a display. With `frames`, clips:
    the objects fall, slide and push each other.

    Args:
        split: "train" or "held_out".
        size: side of the images in pixels.
        objects: least and greatest number of objects in a scene, nine at most.
        frames: T, of a clip; None for images.
        length: scenes in an epoch; by default 6400 for training and 320 held out.
        seed: of the scenes.

    Raises:
        InvalidArgument: an unknown split, or numbers out of range.
        MissingExtra: without pybullet.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 64,
        objects: tuple[int, int] = (3, 6),
        frames: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("split", split, ("train", "held_out"))
        if size < 16:
            raise InvalidArgument("size", expected="at least 16 pixels, so that shapes can be told", got=size)
        if not 1 <= objects[0] <= objects[1] <= _CELLS**2:
            raise InvalidArgument("objects", expected=f"1 <= least <= greatest <= {_CELLS**2}", got=objects)
        length = (6400 if split == "train" else 320) if length is None else length
        check_positive(length=length, frames=1 if frames is None else frames)
        self.split, self.size, self.objects, self.frames, self.seed = split, size, objects, frames, seed
        self._length = int(length)
        _engine()  # a missing package shows here, not in the middle of an epoch

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`scene 17`, for instance."""
        return f"scene {index}"

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B *T 3 H W"], Int[Tensor, "B *T H W"]]:
        """Normalised images or clips, and the number of the object in each pixel, 0 on the table."""
        scenes = self.render(indices, epoch)
        return normalised(scenes.images), scenes.masks

    def render(self, indices: Sequence[int], epoch: int = 0) -> Rendered:
        """These scenes as they are seen."""
        training = self.split == "train"
        key = keys(self.seed, 9, int(training), epoch if training else 0, np.asarray(indices, np.uint64))
        random = uniforms(key, _PER_SCENE + _CELLS**2 * (1 + _PER_OBJECT))
        scenes = [self._scene(row.astype(np.float64)) for row in random]
        images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
        return Rendered(images, masks) if self.frames else Rendered(images[:, 0], masks[:, 0])

    def _scene(self, random: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The frames `[T, 3, H, W]` and masks `[T, H, W]` of one scene."""
        engine, world = _engine(), {"physicsClientId": _world(os.getpid())}
        ours, rest = random[:_PER_SCENE], random[_PER_SCENE:]
        cells, rest = rest[: _CELLS**2].argsort(), rest[_CELLS**2 :].reshape(_CELLS**2, _PER_OBJECT)
        engine.resetSimulation(**world)
        engine.setGravity(0, 0, -9.8, **world)
        engine.setTimeStep(_STEP, **world)
        table = engine.loadURDF(f"{_models()}/plane.urdf", **world)
        engine.changeVisualShape(table, -1, rgbaColor=_colour(ours[0], 0.3 * ours[1], 0.6 + 0.3 * ours[2]), **world)
        least, most = self.objects
        count = least + int(ours[3] * (most - least + 1))
        bodies = [
            self._object(engine, world, cell, own) for cell, own in zip(cells[:count].tolist(), rest, strict=False)
        ]
        view = engine.computeViewMatrixFromYawPitchRoll([0, 0, 0.02], 0.9, 360 * ours[4], -35 - 15 * ours[5], 0, 2)
        lens = engine.computeProjectionMatrixFOV(38, 1, 0.05, 3)
        frames, masks = [], []
        for _ in range(self.frames or 1):
            if self.frames:
                for _ in range(_STEPS):
                    engine.stepSimulation(**world)
            _, _, pixels, _, seen = engine.getCameraImage(
                self.size, self.size, view, lens, lightDirection=[1, 1, 2], shadow=1,
                renderer=engine.ER_TINY_RENDERER, **world,
            )  # fmt: skip
            shape = (self.size, self.size)
            frames.append(np.reshape(pixels, (*shape, 4))[..., :3].astype(np.uint8).transpose(2, 0, 1))
            number = np.zeros(max((table, *bodies)) + 2, np.int64)  # a body's; -1, where nothing is, is the last
            number[bodies] = np.arange(1, count + 1)
            masks.append(number[np.reshape(seen, shape)])
        return np.stack(frames), np.stack(masks)

    def _object(self, engine: ModuleType, world: dict[str, Any], cell: int, random: NDArray[np.float64]) -> int:
        first, last = (0, _HELD_OUT) if self.split == "train" else (_HELD_OUT, _MODELS)
        model = first + int(random[0] * (last - first))
        turned = engine.getQuaternionFromEuler([0, 0, 2 * np.pi * random[1]])
        body = engine.loadURDF(
            f"{_models()}/random_urdfs/{model:03}/{model:03}.urdf",
            [0, 0, 0], turned, globalScaling=0.7 + 0.4 * random[2], **world,
        )  # fmt: skip
        engine.changeVisualShape(
            body, -1, rgbaColor=_colour(random[3], 0.6 + 0.4 * random[4], 0.5 + 0.5 * random[5]), **world
        )
        (low, high), width = engine.getAABB(body, **world), _REACH / _CELLS
        middle = [(low[axis] + high[axis]) / 2 for axis in (0, 1)]
        at = [((cell // _CELLS, cell % _CELLS)[axis] + 0.25 + 0.5 * random[6 + axis]) * width for axis in (0, 1)]
        drop = 0.05 + 0.15 * random[8] if self.frames else 0.0
        place = [at[axis] - _REACH / 2 - middle[axis] for axis in (0, 1)]
        engine.resetBasePositionAndOrientation(body, [*place, drop - low[2]], turned, **world)
        if self.frames:
            speed, angle = 0.2 + 0.6 * random[9], 2 * np.pi * random[10]
            engine.resetBaseVelocity(
                body, [speed * np.cos(angle), speed * np.sin(angle), 0], [0, 0, 6 * random[11] - 3], **world
            )
        return body


def _colour(hue: float, saturation: float, value: float) -> list[float]:
    return [*colorsys.hsv_to_rgb(hue, saturation, value), 1.0]


@cache
def _engine() -> ModuleType:
    try:
        import pybullet
        import pybullet_data  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pybullet", extra="scenes", purpose="render tabletop scenes") from error
    return pybullet


@cache
def _models() -> str:
    import pybullet_data

    return pybullet_data.getDataPath()


@cache
def _world(process: int) -> int:  # noqa: ARG001
    """A world of the process: one that was forked has its own."""
    return _engine().connect(_engine().DIRECT)
