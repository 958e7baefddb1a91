"""Interleaved text and images: documents, data sets of them, and their batches for a language model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from narrows.data.images import IGNORED
from narrows.data.positions import Position
from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_positive

IMAGE = "<image>"
"""The placeholder of an image in a text."""

END_OF_CHUNK = "<|endofchunk|>"
"""The end of the text about an image, as in OpenFlamingo."""


@dataclass(frozen=True)
class Document:
    """A text and its images.

    Args:
        text: with `IMAGE` in place of each image.
        images: one for each `IMAGE`, with values in 0..1.
        counts: False for padding that fills up a batch and is not trained on.
    """

    text: str
    images: Float[Tensor, "M C H W"]
    counts: bool = True


class InterleavedSet(Dataset[Document]):
    """Documents that can be fetched a batch at a time.

    A subclass implements `__len__`, `documents` and `name`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def documents(self, indices: Sequence[int], epoch: int = 0) -> list[Document]:
        """These documents, a pure function of the arguments."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of a document in tables and errors."""
        raise NotImplementedError

    def __getitem__(self, index: int | Position) -> Document:
        position = index if isinstance(index, Position) else Position(range(len(self))[index])
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[Position]) -> list[Document]:
        """A whole batch at once: `DataLoader` calls this where it exists."""
        documents = self.documents([position.index for position in positions], positions[0].epoch)
        return [replace(one, counts=place.counts) for one, place in zip(documents, positions, strict=True)]


def with_chunk_ends(text: str) -> str:
    """The text with `END_OF_CHUNK` added after the text about each image, where it is missing.

    >>> with_chunk_ends("Two cats: <image><image> a tabby. <image>a Persian")
    'Two cats:<|endofchunk|><image><image>a tabby.<|endofchunk|><image>a Persian<|endofchunk|>'
    """
    pieces = [piece.strip() for piece in re.split(f"({re.escape(IMAGE)})", text)]
    return "".join(
        piece if piece in ("", IMAGE) or piece.endswith(END_OF_CHUNK) else piece + END_OF_CHUNK for piece in pieces
    )


class InterleavedBatch(TypedDict):
    """Arguments of a language model with media.

    `media_locations` is True at the tokens of images; `labels` are `IGNORED` there and at padding. A batch without any
    image has a masked one, so that every parameter gets a gradient.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    media: Float[Tensor, "B M C H W"]
    media_mask: Bool[Tensor, "B M"]
    media_locations: Bool[Tensor, "B T"]
    labels: Int[Tensor, "B T"]


def without_labels(batch: InterleavedBatch) -> dict[str, Tensor]:
    """The arguments of a call that computes no loss."""
    return {name: value for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}


class _Row(NamedTuple):
    ids: Tensor
    locations: Tensor
    images: Tensor
    labels: Tensor


class InterleavedCollate:
    """Tokenises documents to a padded batch, with `END_OF_CHUNK` after the text about each image.

    Args:
        tokenizer: of transformers.
        image_token: the token of an image in the vocabulary. A language model without one can take any, its end-of-text
            token for instance: `media_locations` tells images apart.
        end_of_chunk: the token of the vocabulary for `END_OF_CHUNK`.
        max_tokens: documents are cut to this length, with the images beyond.
        max_images: documents are cut before one image more.
        mask_before_first_image: no loss on the text before a document's first image.
        padding_side: "right" to train, "left" to generate.

    Raises:
        InvalidArgument: a token is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_token: str = IMAGE,
        end_of_chunk: str = END_OF_CHUNK,
        max_tokens: int = 256,
        max_images: int | None = None,
        mask_before_first_image: bool = False,
        padding_side: str = "right",
    ) -> None:
        check_positive(max_tokens=max_tokens, **({} if max_images is None else {"max_images": max_images}))
        check_choice("padding_side", padding_side, ("left", "right"))
        self.tokenizer, self.max_tokens, self.max_images = tokenizer, max_tokens, max_images
        self.mask_before_first_image, self.padding_side = mask_before_first_image, padding_side
        self.ids = {IMAGE: self._id("image_token", image_token), END_OF_CHUNK: self._id("end_of_chunk", end_of_chunk)}
        begin = tokenizer.bos_token_id
        self._begin = [begin] if begin is not None and begin in tokenizer("").input_ids else []

    def __call__(self, documents: Sequence[Document]) -> InterleavedBatch:
        """The batch of these documents."""
        return self.prompts([Document(with_chunk_ends(one.text), one.images, one.counts) for one in documents])

    def prompts(self, documents: Sequence[Document]) -> InterleavedBatch:
        """The batch of these documents, without adding `END_OF_CHUNK`."""
        rows = [self._row(document) for document in documents]
        most = max(1, *(len(row.images) for row in rows))
        shape = next((one.images.shape[1:] for one in documents if len(one.images)), documents[0].images.shape[1:])
        media = torch.zeros(len(rows), most, *shape)
        for index, row in enumerate(rows):
            media[index, : len(row.images)] = row.images
        return {
            "input_ids": self._padded([row.ids for row in rows], self._padding_id),
            "attention_mask": self._padded([torch.ones_like(row.ids) for row in rows], 0),
            "media": media,
            "media_mask": torch.arange(most) < torch.tensor([[len(row.images)] for row in rows]),
            "media_locations": self._padded([row.locations for row in rows], False),
            "labels": self._padded([row.labels for row in rows], IGNORED),
        }

    @property
    def _padding_id(self) -> int:
        """Any token will do where the tokenizer has no padding token: it is masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ids[END_OF_CHUNK]

    def _padded(self, rows: Sequence[Tensor], value: int | bool) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side)

    def _row(self, document: Document) -> _Row:
        """Tokens of one document. Text between placeholders is tokenised alone, so that none becomes a placeholder."""
        ids, images = list(self._begin), []
        for piece in re.split(f"({re.escape(IMAGE)}|{re.escape(END_OF_CHUNK)})", document.text):
            if piece == IMAGE:
                if self.max_images is not None and len(images) == self.max_images:
                    break
                images.append(len(ids))
            if piece:
                one = self.ids.get(piece)
                ids += self.tokenizer(piece, add_special_tokens=False).input_ids if one is None else [one]
        ids = ids[: self.max_tokens]
        images = [place for place in images if place < len(ids)]
        locations = torch.zeros(len(ids), dtype=torch.bool)
        locations[images] = True
        tokens = torch.tensor(ids, dtype=torch.long)
        labels = tokens.masked_fill(locations, IGNORED)
        if self.mask_before_first_image and images:
            labels[: images[0]] = IGNORED
        if not document.counts:
            labels[:] = IGNORED
        return _Row(tokens, locations, document.images[: len(images)], labels)

    def _id(self, argument: str, token: str) -> int:
        if token not in (vocabulary := self.tokenizer.get_vocab()):
            raise InvalidArgument(
                argument,
                expected="a token of the tokenizer",
                got=repr(token),
                hint=f"Name one that is there, {self.tokenizer.eos_token!r} for instance, or add it to the tokenizer "
                "and to the language model's embeddings first.",
            )
        return vocabulary[token]
