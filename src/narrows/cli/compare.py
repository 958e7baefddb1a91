"""`narrows compare`: the main job."""

from narrows.cli.parsing import call
from narrows.jobs import compare as comparison


def run(arguments: list[str]) -> None:
    """Train, compare and report."""
    call(compare, arguments)


def compare(
    data: str = "digits",
    models: str = ",".join(comparison.MODELS),
    seeds: int = 1,
    epochs: int = 10,
    batch_size: int = 64,
    image_size: int | None = None,
    learning_rate: float = 2e-3,
    output: str = "runs",
    device: str = "auto",
) -> None:
    """Train models side by side on one image data set; report accuracy, cost and where tokens went.

    Args:
        data: "digits" (scenes with handwritten digits, no download), "small_digits" (the digit a quarter as wide as the
            scene), or a folder with one folder of images per class.
        models: registry names, separated by commas; `narrows info` lists them.
        seeds: how many seeds each model is trained from; two or more give a spread.
        epochs: passes over the training images.
        batch_size: images in a training step.
        image_size: side of the images in pixels; by default 32 for digits, 64 for small digits and folders.
        learning_rate: at its highest.
        output: folder of all comparisons.
        device: "auto", "cpu" or "cuda".
    """
    found = comparison.compare(
        data,
        models=[name for name in models.replace(" ", "").split(",") if name],
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        learning_rate=learning_rate,
        output=output,
        device=device,
    )
    print(f"{found}\nReport: {found.report}")
    if found.interrupted:
        raise KeyboardInterrupt(f"The models that were finished are in {found.folder}")
