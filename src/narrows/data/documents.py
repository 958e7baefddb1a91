"""Interleaved text and images: documents, data sets of them, and their batches for a language model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from narrows.data.images import IGNORED
from narrows.data.positions import Position
from narrows.errors import InvalidArgument
from narrows.validation import check_choice, check_not_negative, check_positive

IMAGE = "<image>"
"""The placeholder of an image in a text."""

END_OF_CHUNK = "<|endofchunk|>"
"""The end of the text about an image, as in OpenFlamingo."""


class Message(NamedTuple):
    """What one side of a conversation says.

    Args:
        role: "user", "assistant" or "system", as the chat template of the language model knows it.
        content: with `IMAGE` in place of each image.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text and its images, or a conversation and its images.

    Args:
        text: with `IMAGE` in place of each image; of a conversation, its contents one after the other.
        images: one for each `IMAGE`, with values in 0..1.
        counts: False for padding that fills up a batch and is not trained on.
        messages: the conversation, which the tokenizer's chat template writes out; empty: the text as it is.
    """

    text: str
    images: Float[Tensor, "M C H W"]
    counts: bool = True
    messages: Sequence[Message] = ()


def questions_of(document: Document) -> list[tuple[Document, str]]:
    """The answers of a conversation, each with what stands before it and the images until then."""
    asked = []
    for number, message in enumerate(document.messages):
        if message.role == "assistant":
            before = document.messages[:number]
            asked.append((conversation(before, document.images[: text_of(before).count(IMAGE)]), message.content))
    return asked


def conversation(messages: Sequence[Message], images: Float[Tensor, "M C H W"]) -> Document:
    """A document of these messages."""
    return Document(text_of(messages), images, messages=tuple(messages))


def text_of(messages: Sequence[Message]) -> str:
    """The contents of a conversation one after the other."""
    return "\n".join(message.content for message in messages)


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

    `media_locations` is True at the tokens of images; `labels` are `IGNORED` there, at padding, and at what a
    conversation has beside its answers. Where that counts too, `weights` are those of the labels in the loss. A batch
    without any image has a masked one, so that every parameter gets a gradient.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    media: Float[Tensor, "B M C H W"]
    media_mask: Bool[Tensor, "B M"]
    media_locations: Bool[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    weights: NotRequired[Float[Tensor, "B T"]]


def without_labels(batch: InterleavedBatch) -> dict[str, Tensor]:
    """The arguments of a call that computes no loss."""
    left_out = ("labels", "weights")
    return {name: value for name, value in batch.items() if name not in left_out and isinstance(value, Tensor)}


class _Row(NamedTuple):
    ids: Tensor
    locations: Tensor
    images: Tensor
    labels: Tensor
    weights: Tensor


class InterleavedCollate:
    """Tokenises documents to a padded batch, with `END_OF_CHUNK` after the text about each image.

    Conversations are written by the tokenizer's chat template instead. Each answer is tokenised apart from what stands
    before it, as it is when the language model writes it itself; it ends with the token that ends a turn.

    Args:
        tokenizer: of transformers.
        image_token: the token of an image in the vocabulary. A language model without one can take any, its end-of-text
            token for instance: `media_locations` tells images apart.
        end_of_chunk: the token of the vocabulary for `END_OF_CHUNK`.
        max_tokens: documents are cut to this length, with the images beyond.
        max_images: documents are cut before one image more.
        mask_before_first_image: no loss on the text before a document's first image.
        rest_weight: weight, in the loss, of what a conversation has beside its answers; 0: answers alone are learned.
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
        rest_weight: int | float = 0.0,
        padding_side: str = "right",
    ) -> None:
        check_positive(max_tokens=max_tokens, **({} if max_images is None else {"max_images": max_images}))
        check_choice("padding_side", padding_side, ("left", "right"))
        check_not_negative(rest_weight=rest_weight)
        self.tokenizer, self.max_tokens, self.max_images = tokenizer, max_tokens, max_images
        self.mask_before_first_image, self.padding_side = mask_before_first_image, padding_side
        self.rest_weight = float(rest_weight)
        self.ids = {IMAGE: self._id("image_token", image_token), END_OF_CHUNK: self._id("end_of_chunk", end_of_chunk)}
        self._placeholders = re.compile(f"({re.escape(IMAGE)}|{re.escape(END_OF_CHUNK)})")
        begin = tokenizer.bos_token_id
        self._begin = [begin] if begin is not None and begin in tokenizer("").input_ids else []

    def __call__(self, documents: Sequence[Document]) -> InterleavedBatch:
        """The batch of these documents."""
        ended = [one if one.messages else replace(one, text=with_chunk_ends(one.text)) for one in documents]
        return self._batch(ended, asked=False)

    def prompts(self, documents: Sequence[Document]) -> InterleavedBatch:
        """The batch of these documents as prompts: without `END_OF_CHUNK`, and with what begins an answer."""
        return self._batch(documents, asked=True)

    def _batch(self, documents: Sequence[Document], *, asked: bool) -> InterleavedBatch:
        rows = [self._row(document, asked) for document in documents]
        most = max(1, *(len(row.images) for row in rows))
        shape = next((one.images.shape[1:] for one in documents if len(one.images)), documents[0].images.shape[1:])
        media = torch.zeros(len(rows), most, *shape)
        for index, row in enumerate(rows):
            media[index, : len(row.images)] = row.images
        batch: InterleavedBatch = {
            "input_ids": self._padded([row.ids for row in rows], self._padding_id),
            "attention_mask": self._padded([torch.ones_like(row.ids) for row in rows], 0),
            "media": media,
            "media_mask": torch.arange(most) < torch.tensor([[len(row.images)] for row in rows]),
            "media_locations": self._padded([row.locations for row in rows], False),
            "labels": self._padded([row.labels for row in rows], IGNORED),
        }
        if self.rest_weight:
            batch["weights"] = self._padded([row.weights for row in rows], 0.0)
        return batch

    @property
    def _padding_id(self) -> int:
        """Any token will do where the tokenizer has no padding token: it is masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ids[END_OF_CHUNK]

    def _padded(self, rows: Sequence[Tensor], value: int | float) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side)

    def _row(self, document: Document, asked: bool) -> _Row:
        """Tokens of one document. Text between placeholders is tokenised alone, so that none becomes a placeholder."""
        parts = self._turns(document.messages, asked) if document.messages else [(document.text, True)]
        ids, images, answers = ([], [], []) if document.messages else (list(self._begin), [], [True] * len(self._begin))
        pieces = [(piece, answer) for text, answer in parts for piece in self._placeholders.split(text) if piece]
        for piece, answer in pieces:
            if piece == IMAGE:
                if self.max_images is not None and len(images) == self.max_images:
                    break
                images.append(len(ids))
            one = self.ids.get(piece)
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids if one is None else [one]
            answers += [answer] * (len(ids) - len(answers))
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
        weights = torch.where(torch.tensor(answers[: self.max_tokens], dtype=torch.bool), 1.0, self.rest_weight)
        labels = labels.masked_fill(weights == 0, IGNORED)
        return _Row(tokens, locations, document.images[: len(images)], labels, weights)

    def _turns(self, messages: Sequence[Message], asked: bool) -> list[tuple[str, bool]]:
        """The conversation as the chat template writes it, in parts, and whether each is an answer."""
        said = [message._asdict() for message in messages]
        parts: list[tuple[str, bool]] = []
        written = ""
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._written(said[:number], written, begin_answer=True)
            parts.append((before, False))
            answer = self._written(said[: number + 1], written + before)
            end = len(answer.rstrip())  # a line feed after the end of a turn is not what the assistant says
            parts += [(answer[:end], True), (answer[end:], False)]
            written += before + answer
        if messages[-1].role != "assistant":
            parts.append((self._written(said, written, begin_answer=asked), False))
        return parts

    def _written(self, said: list[dict[str, str]], before: str, *, begin_answer: bool = False) -> str:
        """What the chat template adds to `before`."""
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=begin_answer)
        if not text.startswith(before):
            raise InvalidArgument(
                "tokenizer",
                expected="a chat template that leaves what is said as it is when a conversation goes on",
                got=f"{before[-60:]!r}, which becomes {text[: len(before)][-60:]!r}",
                hint="Set tokenizer.chat_template to one that keeps earlier turns.",
            )
        return text[len(before) :]

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
