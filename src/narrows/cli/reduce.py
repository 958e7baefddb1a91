"""`narrows reduce`: token reduction for a model people have."""

from narrows.cli.parsing import call
from narrows.jobs import reduce as job


def run(arguments: list[str]) -> None:
    """Measure and report."""
    call(reduce, arguments)


def reduce(
    model: str | None = None,
    data: str | None = None,
    checkpoint: str | None = None,
    method: str = ",".join(job.METHODS),
    budget: str = ",".join(job.BUDGETS),
    limit: int = 1000,
    batch_size: int = 32,
    output: str = "runs",
    save: str | None = None,
    export: str | None = None,
    device: str = "auto",
) -> None:
    """Report what a vision transformer costs and keeps when it carries fewer tokens.

    Args:
        model: timm:<name>, hf:<name or folder>, a folder written by narrows, or a registry name; by default a small
            vision transformer that is trained on digit scenes, once, in a few minutes.
        data: a folder of images, with one folder for each class (for accuracy too) or without.
        checkpoint: a file with weights (safetensors, or .pth with nothing but weights) for the model; nothing is
            downloaded then.
        method: ats, topk, evit, tome, random, separated by commas.
        budget: separated by commas, each a share of the tokens (0.5), a count (98), MACs per image (2.9G), the time of
            a batch (40ms), or shares block by block (3:0.7/6:0.49/9:0.34).
        limit: at most so many images.
        batch_size: images in a batch.
        output: folder of all runs.
        save: file for the chosen reduction, as JSON that narrows.reduce_tokens(model, **json) takes.
        export: file for the model under the chosen reduction, as ONNX.
        device: "auto", "cpu" or "cuda".
    """
    found = job.reduce(
        model,
        data=data,
        checkpoint=checkpoint,
        methods=_listed(method),
        budgets=_listed(budget),
        limit=limit,
        batch_size=batch_size,
        output=output,
        save=save,
        export=export,
        device=device,
    )
    written = [f"{what}: {path}" for what, path in (("Saved", save), ("Exported", export)) if path is not None]
    print("\n".join([str(found), f"Chosen: {found.chosen.name} ({found.why})", *written, f"Report: {found.report}"]))


def _listed(text: str) -> list[str]:
    return [part for part in text.replace(" ", "").split(",") if part]
