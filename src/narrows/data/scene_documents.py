"""Interleaved documents without a download: captioned digit scenes, and text about digits without scenes.

A language model learns the language from `digit_sentences`, where the digits of captions are random; which digit an
image shows can be learned from `DigitPrompts` alone.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from narrows.data.documents import END_OF_CHUNK, IMAGE, Document, InterleavedSet
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
        return [Document(captions(labels.tolist(), styles), images) for images, labels, styles in shown]


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
