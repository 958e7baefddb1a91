"""Interleaved documents without a download: captioned digit scenes, and text about digits without scenes.

A language model learns the language from `digit_sentences`, where the digits of captions are random; which digit an
image shows can be learned from `DigitPrompts` alone.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.data.documents import END_OF_CHUNK, IMAGE, Document, InterleavedSet, Message, conversation
from narrows.data.images import IGNORED
from narrows.data.object_scenes import COLOURS, SHAPES, ObjectScene, SpriteScenes
from narrows.data.positions import keys, uniforms
from narrows.data.scenes import DigitScenes
from narrows.errors import InvalidArgument
from narrows.validation import check_choice

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth")

_CAPTIONS = (
    "the {ordinal} image shows a {digit}",
    "the {ordinal} shows a {digit}",
    "in the {ordinal} image there is a {digit}",
    "here is a {digit}",
)
_FACTS = (
    "{one} plus one is {next}",
    "{next} minus one is {one}",
    "{one} comes before {next}",
    "after {one} comes {next}",
    "{one} and {other} are digits",
)


_ASKED = ("Which digit is this?", "What does this image show?", "Read this digit.")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS)
"""The cells of a grid of three by three, in words, row by row."""
CELLS = len(PLACES)


_SYSTEM = Message("system", "You look at images.")


class Question(NamedTuple):
    """A text that ends before a digit, and the digit.

    Args:
        text: up to the digit.
        answer: the digit in words.
        image: index of the image in the document that shows it.
    """

    text: str
    answer: str
    image: int


class DigitPrompts(InterleavedSet):
    """One to `max_images` digit scenes, each followed by a caption that names its digit.

    Document i is a pure function of (seed, split, epoch, i): training documents are drawn anew every epoch, held-out
    ones never change and show digits of other handwriting (`DigitScenes`).

    Args:
        split: "train" or "held_out".
        size: side of the scenes in pixels.
        channels: 1, or 3 for grey scenes in three channels.
        max_images: greatest number of images in a document, up to 4.
        length: documents in an epoch.
        seed: of documents and scenes.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 32,
        channels: int = 1,
        max_images: int = 3,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("channels", str(channels), ("1", "3"))
        if not 1 <= max_images <= len(ORDINALS):
            raise InvalidArgument("max_images", expected=f"1 to {len(ORDINALS)}", got=max_images)
        self.channels, self.max_images, self.seed = channels, max_images, seed
        self._length = (3000 if split == "train" else 480) if length is None else length
        self.scenes = DigitScenes(split, size=size, length=self._length * max_images, seed=seed)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`prompt 17`, for instance."""
        return f"prompt {index}"

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These documents."""
        return [Document(captions(digits, styles), images) for images, digits, styles in self.scenes_of(indices, epoch)]

    def scenes_of(
        self, indices: Sequence[int], epoch: int = 0
    ) -> list[tuple[Float[Tensor, "M C H W"], list[int], list[float]]]:
        """Images, their digits, and numbers in [0, 1) that choose the wording, of each of these documents."""
        training = self.scenes.split == "train"
        key = keys(self.seed, 3, int(training), epoch if training else 0, np.asarray(indices, np.uint64))
        random = torch.from_numpy(uniforms(key, 1 + len(ORDINALS)))
        counts = (random[:, 0] * self.max_images).long().add(1).tolist()
        first = [index * self.max_images for index in indices]
        scenes = self.scenes.render(
            [at + k for at, count in zip(first, counts, strict=True) for k in range(count)], epoch
        )
        pictures = (scenes.images.float() / 255).expand(-1, self.channels, -1, -1).split(counts)
        shown = zip(pictures, scenes.labels.split(counts), random[:, 1:].tolist(), strict=True)
        return [(images, labels.tolist(), styles) for images, labels, styles in shown]


class DigitChats(InterleavedSet):
    """Conversations about digit scenes: in each turn an image and a question, and the digit in one word as the answer.

    Images are those of `DigitPrompts` with the same arguments, and pure functions of the same. The digit of a turn can
    be known from its own image alone.

    Args:
        split, options: as `DigitPrompts` takes them.
    """

    def __init__(self, split: str = "train", **options: Any) -> None:
        self.prompts = DigitPrompts(split, **options)

    def __len__(self) -> int:
        return len(self.prompts)

    def name(self, index: int) -> str:
        """`conversation 17`, for instance."""
        return f"conversation {index}"

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These conversations."""
        return [
            conversation([_SYSTEM, *(message for turn in turns for message in turn)], images)
            for turns, images in (
                (
                    [
                        (Message("user", IMAGE + _ASKED[int(style * len(_ASKED))]), Message("assistant", DIGITS[digit]))
                        for digit, style in zip(digits, styles, strict=False)
                    ],
                    images,
                )
                for images, digits, styles in self.prompts.scenes_of(indices, epoch)
            )
        ]


class ShapeChats(InterleavedSet):
    """Conversations about one scene of two or three coloured shapes in a grid: it is described, object by object.

    The answer names place, colour and shape of every object, row by row: "The top left holds a red disc, the middle
    center a blue square." Document i is a pure function of (seed, split, epoch, i), as `SpriteScenes` are.

    Args:
        split: "train" or "held_out".
        size: side of the scenes in pixels.
        length: documents in an epoch.
        seed: of the scenes.
    """

    def __init__(self, split: str = "train", *, size: int = 32, length: int | None = None, seed: int = 0) -> None:
        length = (6400 if split == "train" else 320) if length is None else length
        self.scenes = SpriteScenes(
            split, size=size, objects=(2, 3), radius=(0.13, 0.16), cells=3, length=length, seed=seed
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        """`scene 17`, for instance."""
        return self.scenes.name(index)

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These conversations."""
        scenes = self.scenes.render(indices, epoch)
        objects = torch.stack((cells_of(scenes), scenes.colours, scenes.shapes), -1)
        return [
            conversation(
                [_SYSTEM, Message("user", f"{IMAGE}Describe it."), Message("assistant", description(rows))], image
            )
            for image, rows in zip((scenes.images.float() / 255).unsqueeze(1), objects.tolist(), strict=True)
        ]


def cells_of(scenes: ObjectScene) -> Int[Tensor, "B K"]:
    """The cell of the grid of three by three in which each object stands, counted row by row."""
    column, row = (scenes.centres * len(_ROWS)).long().unbind(-1)
    return row * len(_COLUMNS) + column


class SeenObject(NamedTuple):
    """An object of a description, in words."""

    place: str
    colour: str
    shape: str


def description(objects: Sequence[Sequence[int]]) -> str:
    """A sentence about objects, each given as cell, colour and shape by number; `IGNORED` colours are left out."""
    seen = sorted(tuple(one) for one in objects if one[1] != IGNORED)
    words = [f"the {PLACES[cell]} a {COLOURS[colour]} {SHAPES[shape]}" for cell, colour, shape in seen]
    return ", ".join(words).replace("the", "The", 1).replace(" a ", " holds a ", 1) + "."


def described(text: str) -> list[SeenObject]:
    """The objects that a description names, in its order."""
    rows, columns, colours, shapes = map("|".join, (_ROWS, _COLUMNS, COLOURS, SHAPES))
    found = re.finditer(rf"({rows}) ({columns}) (?:holds )?an? ({colours}) ({shapes})", text)
    return [SeenObject(f"{one[1]} {one[2]}", one[3], one[4]) for one in found]


def captions(digits: Sequence[int], styles: Sequence[float]) -> str:
    """A text of images that show `digits`, each with a caption; `styles` in [0, 1) choose the wording."""
    words = (
        _CAPTIONS[int(style * len(_CAPTIONS))].format(ordinal=ordinal, digit=DIGITS[digit])
        for ordinal, digit, style in zip(ORDINALS, digits, styles, strict=False)
    )
    return "".join(f"{IMAGE}{one}{END_OF_CHUNK}" for one in words)


def questions(text: str) -> list[Question]:
    """A question about each image of a text of captions: the text up to the digit."""
    found = re.finditer(rf"\b({'|'.join(DIGITS)})\b", text)
    return [Question(text[: m.start()].rstrip(), m[0], text[: m.start()].count(IMAGE) - 1) for m in found]


def digit_sentences(count: int, seed: int) -> list[str]:
    """`count` texts about digits, without images: captions of random digits, and facts ("one plus one is two")."""
    random = uniforms(keys(seed, 4, np.arange(count, dtype=np.uint64)), 2 + 3 * len(ORDINALS))
    return [_captions(row) if row[0] < 0.5 else _facts(row) for row in random.tolist()]


def _captions(random: Sequence[float]) -> str:
    images = 1 + int(random[1] * len(ORDINALS))
    return captions([int(10 * digit) for digit in random[2::3]][:images], random[3::3])


def _facts(random: Sequence[float]) -> str:
    facts = []
    for style, one, other in zip(random[2::3], random[3::3], random[4::3], strict=True):
        fact, number = _FACTS[int(style * len(_FACTS))], int(one * 9)
        facts.append(fact.format(one=DIGITS[number], next=DIGITS[number + 1], other=DIGITS[int(other * 10)]))
    return END_OF_CHUNK.join(facts) + END_OF_CHUNK


CHATS = {"digit_chats": DigitChats, "shape_chats": ShapeChats}
"""Conversations about scenes, by name."""


def load_scene_documents(name: str, split: str, *, size: int, channels: int, seed: int = 0) -> InterleavedSet:
    """One split of "digits" or of `CHATS`.

    Raises:
        InvalidArgument: shapes without colours.
    """
    if name == "shape_chats":
        if channels != 3:
            raise InvalidArgument("channels", expected="3 for shape_chats, whose shapes have colours", got=channels)
        return ShapeChats(split, size=size, seed=seed)
    kind = DigitPrompts if name == "digits" else DigitChats
    return kind(split, size=size, channels=channels, seed=seed)
