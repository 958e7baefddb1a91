"""A trained `Flamingo` with its tokenizer: text and pictures in, text out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from narrows.adapters.flamingo import Flamingo
from narrows.data.documents import END_OF_CHUNK, IMAGE, Document, InterleavedCollate, without_labels
from narrows.errors import InvalidArgument
from narrows.hub.parts import ClassifierEncoder, VisionEncoder, open_language_model, open_vision_encoder
from narrows.hub.token_rows import TokenRows

FORMAT_FILE = "reader.json"
ENCODER_FOLDER = "vision_encoder"
ROWS_FILE = "new_tokens.safetensors"


@dataclass(frozen=True)
class ReaderFormat:
    """How a prompt is written, and what encodes its pictures.

    Args:
        image_token: token of the vocabulary where a picture stands.
        end_of_chunk: token of the vocabulary that ends what is said about a picture.
        vision_encoder: what `open_vision_encoder` takes; empty: it is saved with the model.
        new_tokens: tokens whose rows of the embeddings were trained; they are saved with the model.
    """

    image_token: str = IMAGE
    end_of_chunk: str = END_OF_CHUNK
    vision_encoder: str = ""
    new_tokens: Sequence[str] = ()


@dataclass(frozen=True)
class Reader:
    """Generates text from prompts with pictures.

    Args:
        model: a `Flamingo` whose vision encoder is a `VisionEncoder`.
        tokenizer: of its language model.
        format: of prompts.
    """

    model: Flamingo
    tokenizer: Any
    format: ReaderFormat = field(default_factory=ReaderFormat)

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        encoder = self.model.vision_encoder
        assert isinstance(encoder, VisionEncoder)
        return encoder

    def arguments(self, prompts: Sequence[Document]) -> dict[str, Tensor]:
        """The prompts as the model takes them, padded on the left."""
        collate = InterleavedCollate(
            self.tokenizer,
            image_token=self.format.image_token,
            end_of_chunk=self.format.end_of_chunk,
            max_tokens=2**31,
            padding_side="left",
        )
        device = self.model.resampler.latents.device
        return {name: value.to(device) for name, value in without_labels(collate.prompts(prompts)).items()}

    def generate(
        self, prompts: Sequence[Document], *, max_new_tokens: int = 32, blind: bool = False, **options: Any
    ) -> list[str]:
        """What the model writes after each prompt, up to the end of the chunk.

        Args:
            prompts: text and pictures, an `IMAGE` for each.
            max_new_tokens: at most so many.
            blind: let the language model write by itself, as if nothing had been added to it.
            options: everything else that `generate` of the language model takes.

        Raises:
            InvalidArgument: a prompt whose pictures and places for them do not agree.
        """
        for index, prompt in enumerate(prompts):
            if (places := prompt.text.count(IMAGE)) != len(prompt.images):
                raise InvalidArgument(
                    "media",
                    expected=f"{places} pictures, one for each {IMAGE} of prompt {index}",
                    got=len(prompt.images),
                )
        batch = self.arguments(prompts)
        end = self.tokenizer.get_vocab()[self.format.end_of_chunk]
        writer: Any = self.model.eval()
        if blind:
            writer = self.model.language_model
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        asked = {"eos_token_id": end, "pad_token_id": end, "do_sample": False, "max_new_tokens": max_new_tokens}
        written = writer.generate(**batch, **(asked | options))[:, batch["input_ids"].shape[1] :]
        texts = [row.tolist() for row in written]
        ended = [row[: row.index(end)] if end in row else row for row in texts]
        return self.tokenizer.batch_decode(ended, skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write what was added, the format of prompts, and a narrows encoder; `open_reader` reads them."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        if self.format.new_tokens:
            rows = TokenRows(self.model.language_model, self.tokenizer, self.format.new_tokens)
            save_file(rows.state_dict(), folder / ROWS_FILE)
        if isinstance(self.encoder, ClassifierEncoder):
            self.encoder.classifier.save_pretrained(folder / ENCODER_FOLDER)
        # Last: where it is, everything is.
        (folder / FORMAT_FILE).write_text(json.dumps(asdict(self.format), indent=2) + "\n", encoding="utf-8")


def open_reader(language_model: str | Path, checkpoint: str | Path) -> Reader:
    """A language model with what was trained for it.

    Args:
        language_model: a folder or a hub name of a causal language model with its tokenizer.
        checkpoint: a folder written by `narrows fit` or `Reader.save`.

    Raises:
        InvalidArgument: either of them is not there, or they do not belong together.
    """
    file = Path(checkpoint) / FORMAT_FILE
    if not file.is_file():
        raise InvalidArgument(
            "checkpoint", expected=f"a folder with {FORMAT_FILE}, the 'model' of a run", got=repr(str(checkpoint))
        )
    written = ReaderFormat(**json.loads(file.read_text(encoding="utf-8")))
    encoder = open_vision_encoder(written.vision_encoder or Path(checkpoint) / ENCODER_FOLDER)
    text, tokenizer = open_language_model(language_model)
    if written.new_tokens:
        TokenRows(text, tokenizer, written.new_tokens).load_state_dict(load_file(Path(checkpoint) / ROWS_FILE))
    model = Flamingo.from_pretrained(str(checkpoint), language_model=text, vision_encoder=encoder)
    return Reader(model.eval(), tokenizer, written)


def read_pictures(paths: Sequence[str | Path], encoder: VisionEncoder) -> Float[Tensor, "M C H W"]:
    """Picture files as the encoder takes them.

    Raises:
        InvalidArgument: a file that does not exist.
        DataError: one that cannot be read; it is named.
    """
    from narrows.data.document_files import picture_transform
    from narrows.data.folder import read_image

    transform = picture_transform(encoder.image_size, encoder.channels)
    for path in map(Path, paths):
        if not path.is_file():
            raise InvalidArgument("media", expected="picture files", got=f"{str(path)!r}, which does not exist")
    pictures = [transform(read_image(Path(path))) for path in paths]
    empty = torch.zeros(0, encoder.channels, encoder.image_size, encoder.image_size)
    return torch.stack(pictures) if pictures else empty
