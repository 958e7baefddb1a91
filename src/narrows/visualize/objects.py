"""Pictures of objects that were found: image, truth, masks, reconstruction, and what each slot put there."""

from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.visualize.canvas import carrier_colour, new_figure, panel_ratio, set_heading, show_picture
from narrows.visualize.images import fit, paint_owners, to_image

if TYPE_CHECKING:
    import matplotlib.figure

PANEL = 1.2


def found_objects(
    images: Float[Tensor, "B 3 H W"],
    masks: Float[Tensor, "B K H W"],
    *,
    truth: Int[Tensor, "B H W"] | None = None,
    reconstruction: Float[Tensor, "B 3 H W"] | None = None,
    parts: Float[Tensor, "B K 3 H W"] | None = None,
    clip: bool = False,
) -> "matplotlib.figure.Figure":
    """Draw what slots found in images, an image a row.

    Columns are the image, the true objects, the slot of each pixel, the reconstruction, and what each slot alone puts
    there, on white, as far as its mask goes. The slot with the most pixels is grey: in scenes, the background. The
    others have colours of their own; a true object has the colour of the slot that holds most of it. A clip has
    the same colours in all frames.

    Args:
        images: in 0..1.
        masks: share of each slot in each pixel.
        truth: the number of the object in each pixel, 0 on the background, negative where nothing is known.
        reconstruction: in 0..1.
        parts: of each slot alone, in 0..1; for parts in colour there have to be masks of their size.
        clip: whether these are the frames of one clip.

    Raises:
        InvalidArgument: no image, or masks of other images.
        MissingExtra: without matplotlib.
    """
    if not len(images) or len(masks) != len(images):
        raise InvalidArgument("masks", expected="masks of one image or more, for each image", got=tuple(masks.shape))
    rows, owners = [], masks.argmax(1)
    for sample, image in enumerate(images):
        canvas = fit(to_image(image))
        seen = slice(None) if clip else slice(sample, sample + 1)
        sizes = owners[seen].flatten().bincount(minlength=masks.shape[1])
        ranks = {slot: rank for rank, slot in enumerate(sizes.argsort(descending=True).tolist())}
        colours = {slot: carrier_colour(rank - 1) for slot, rank in ranks.items() if rank}
        row = {"image": canvas}
        if truth is not None:
            row["truth"] = paint_owners(canvas, truth[sample], _of_truth(truth[seen], owners[seen], colours))
        row["masks"] = paint_owners(canvas, owners[sample], colours)
        if reconstruction is not None:
            row["rebuilt"] = fit(reconstruction[sample].clamp(0, 1))
        if parts is not None:
            shares = masks[sample].unsqueeze(1)
            alone = parts[sample].clamp(0, 1) * shares + 1 - shares
            row |= {f"slot {slot + 1}": fit(part.clamp(0, 1)) for slot, part in enumerate(alone)}
        rows.append(row)
    height = PANEL * panel_ratio(fit(images[0]))
    figure = new_figure(PANEL * len(rows[0]) + 0.2, height * len(rows) + 0.5)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row.values(), strict=True):
            show_picture(axis, picture)
    for axis, name in zip(axes[0], rows[0], strict=True):
        set_heading(axis, name, "")
    return figure


def _of_truth(truth: Int[Tensor, "T H W"], owner: Int[Tensor, "T H W"], colours: dict[int, str]) -> dict[int, str]:
    """A colour for each true object: of the slot that holds most of it, where no larger object has it."""
    taken: dict[int, str] = {}
    numbers, sizes = truth[truth > 0].unique(return_counts=True)
    left = [carrier_colour(rank) for rank in range(len(colours) + len(numbers))]
    for number in numbers[sizes.argsort(descending=True)].tolist():
        slots = owner[truth == number].bincount().argsort(descending=True).tolist()
        wished = [colours[slot] for slot in slots[:1] if slot in colours]
        free = [colour for colour in (*wished, *reversed(left)) if colour not in taken.values()]
        taken[number] = free[0]
    return taken
