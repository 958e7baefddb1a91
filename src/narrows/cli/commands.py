"""The commands that call one function of `narrows.jobs` or `narrows.bench`: signature and help are the function's."""

from narrows.cli.parsing import call
from narrows.errors import Terminated


def compare(arguments: list[str]) -> None:
    """Train, compare and report."""
    from narrows.jobs import compare as job

    found = call(job.compare, arguments)
    print("\n".join([str(found), *([found.verdict] if found.verdict else []), f"Report: {found.report}"]))
    if found.interrupted:
        kept = f"The models that were finished are in {found.folder}. {job.go_on(found.folder)}"
        raise Terminated(found.interrupted, kept)


def reduce(arguments: list[str]) -> None:
    """Measure and report."""
    from narrows.jobs import reduce as job

    found = call(job.reduce, arguments)
    written = [f"{what}: {path}" for what, path in found.written.items()]
    print("\n".join([str(found), f"Chosen: {found.chosen.name} ({found.why})", *written, f"Report: {found.report}"]))


def discover(arguments: list[str]) -> None:
    """Find objects, score and report."""
    from narrows.jobs import discover as job

    found = call(job.discover, arguments)
    print("\n".join([str(found), f"Report: {found.report}"]))


def export(arguments: list[str]) -> None:
    """Write a model for other runtimes, and say how far it is from the original."""
    from narrows.jobs import export as job

    print(call(job.export, arguments))


def show(arguments: list[str]) -> None:
    """Draw pictures."""
    from narrows.jobs import show as job

    call(job.show, arguments, several="images")


def generate(arguments: list[str]) -> None:
    """Write."""
    from narrows.jobs import generate as job

    print(call(job.generate, arguments))


def bench(arguments: list[str]) -> None:
    """Race, print and record."""
    from narrows.bench import rows, runner

    print(rows.table(call(runner.run, arguments, first="pattern")))
