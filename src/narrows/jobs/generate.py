"""`narrows generate`: text from a prompt with pictures."""

from collections.abc import Sequence
from pathlib import Path

from narrows.adapters.flamingo import audit
from narrows.data.documents import IMAGE, Document
from narrows.data.scene_documents import DigitPrompts
from narrows.demo.reader import FOLDER, digits_reader, examine
from narrows.errors import InvalidArgument
from narrows.files import check_writable
from narrows.hub.models import accelerator_of
from narrows.hub.readers import Reader, open_reader, read_pictures
from narrows.validation import check_positive
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
    picture: str | Path | None = None,
    output: str | Path = FOLDER,
    device: str = "auto",
) -> str:
    """Let a language model write after a prompt with pictures; without arguments, one that reads digit scenes.

    Without `lm` and `checkpoint` it is a small language model that has learned to read digit scenes, trained into
    `output` if it is not there yet. Without a prompt as well, it is asked about held-out scenes, and a picture shows
    which image each word looked at.

    Args:
        lm: a folder or a hub name of a causal language model.
        checkpoint: what was trained for it: the folder `model` of a run of `narrows fit`.
        prompt: the text, with `<image>` where a picture stands; without any, the pictures stand before it.
        media: picture files in the order of their places, in a shell separated by commas.
        max_new_tokens: at most so many tokens are written.
        picture: where to draw which image each word looks at.
        output: folder of the small language model, which is used, and trained if need be, without lm and checkpoint.
        device: "auto", "cpu" or "cuda".

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
    if prompt is None and (media or lm is not None):
        raise InvalidArgument("prompt", expected=f"a text, with {IMAGE} where a picture stands", got=None)
    accelerator = accelerator_of(device)
    for path in map(Path, media):
        if not path.is_file():
            raise InvalidArgument("media", expected="picture files", got=f"{str(path)!r}, which does not exist")
    if picture is not None:
        check_writable(picture)
    if lm is None:
        check_writable(output, folder=True)
    if lm is None or checkpoint is None:
        reader = digits_reader(Path(output), accelerator=accelerator)
    else:
        reader = open_reader(lm, checkpoint)
    reader.model.to(accelerator)
    if prompt is None:
        return _show_digits(reader, Path(picture or Path(output) / "reading.png"))
    text = prompt if IMAGE in prompt else IMAGE * len(media) + prompt
    document = Document(text, read_pictures(media, reader.encoder))
    (written,) = reader.generate([document], max_new_tokens=max_new_tokens)
    if picture is not None:
        draw_reading(reader, Document(f"{text} {written}", document.images), picture)
    return written


def draw_reading(reader: Reader, document: Document, path: str | Path) -> Path:
    """Draw which image each word of a document reads in the last gated block, and which image moves what it predicts.

    The one is attention. The other is measured: an image is changed, and the prediction at each word moves or does not.
    """
    arguments = reader.arguments([document])
    moved = audit(reader.model, arguments).routing()
    read = reader.model.routing(**arguments)[-1]
    words = reader.tokenizer.convert_ids_to_tokens(arguments["input_ids"][0].tolist())
    columns = {"what each word reads": read, "what moves the prediction after it": moved}
    return save(reading(words, list(document.images.cpu()), columns), path)


def _show_digits(reader: Reader, path: Path) -> str:
    """How held-out scenes are read: answers to questions, some texts, and the picture."""
    prompts = DigitPrompts("held_out", size=reader.encoder.image_size, channels=reader.encoder.channels)
    answers = examine(reader, prompts)
    several = [document for document in prompts.documents(range(20)) if len(document.images) > 1][:SHOWN]
    lines = [f"{document.text}\n  read as: {_read_aloud(reader, document)}" for document in several]
    draw_reading(reader, max(several, key=lambda document: len(document.images)), path)
    return "\n".join([*lines, "", str(answers), f"Which image each word looked at: {path}"])


def _read_aloud(reader: Reader, document: Document) -> str:
    """The captions the model writes itself, each image shown when its turn comes."""
    text = ""
    for count in range(1, len(document.images) + 1):
        text += IMAGE
        (caption,) = reader.generate([Document(text, document.images[:count])], max_new_tokens=12)
        text += caption + reader.format.end_of_chunk
    return text
