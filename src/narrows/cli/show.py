"""`narrows show`: where the tokens of images go."""

from narrows.cli.parsing import call
from narrows.jobs.show import show


def run(arguments: list[str]) -> None:
    """Draw the pictures."""
    call(show, arguments, several="images")
