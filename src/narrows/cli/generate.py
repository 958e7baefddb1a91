"""`narrows generate`: text from a prompt with pictures."""

from narrows.cli.parsing import call
from narrows.demo.reader import FOLDER
from narrows.jobs import generate as task


def run(arguments: list[str]) -> None:
    """Write."""
    call(generate, arguments)


def generate(
    lm: str | None = None,
    checkpoint: str | None = None,
    prompt: str | None = None,
    media: str = "",
    max_new_tokens: int = 32,
    picture: str | None = None,
    output: str = str(FOLDER),
    device: str = "auto",
) -> None:
    """Let a language model write after a prompt with pictures; without arguments, one that reads digit scenes.

    Args:
        lm: a folder or a hub name of a causal language model.
        checkpoint: what was trained for it: the folder `model` of a run of `narrows fit`.
        prompt: the text, with <image> where a picture stands; without any, the pictures stand before it.
        media: picture files in the order of their places, separated by commas.
        max_new_tokens: at most so many tokens are written.
        picture: where to draw which image each word looks at.
        output: folder of the offline job, which is used, and trained if need be, without lm and checkpoint.
        device: "auto", "cpu" or "cuda".
    """
    files = [name.strip() for name in media.split(",") if name.strip()]
    print(
        task.generate(
            lm,
            checkpoint,
            prompt,
            files,
            max_new_tokens=max_new_tokens,
            picture=picture,
            output=output,
            device=device,
        )
    )
