"""Pictures of a `Routing` drawn over the image of its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from narrows.validation import check_positive
from narrows.visualize.canvas import (
    CARRIERS,
    INK,
    MUTED,
    carrier_colour,
    new_figure,
    panel_ratio,
    set_heading,
    set_note,
    set_title,
    show_picture,
)
from narrows.visualize.images import fit, paint_kept, paint_means, paint_owners, paint_weights, to_image

if TYPE_CHECKING:
    import matplotlib.figure

PANELS_PER_ROW = 5
PANEL = 2.1


def overlay(
    image: object, routing: Routing, *, sample: int = 0, max_carriers: int = 8, title: str | None = None
) -> "matplotlib.figure.Figure":
    """Draw over an image which carriers its tokens went to.

    The routing decides the kind of picture. Where every carrier reads one token at most, tokens were kept or dropped:
    one panel shows the kept ones and dims the rest. Where carriers are tokens that hold several others, tokens were
    merged: beside the image every token has the mean colour of those it was merged with, as in the paper of ToMe
    (arXiv 2210.09461). Otherwise the image stands first, then every token in the colour of
    the carrier with the greatest share of it, then for each carrier the weights with which it reads the tokens, each
    map scaled to its own maximum. Of many carriers, those that carry most tokens are shown.

    Args:
        image: a tensor `[3|1, H, W]`, an array `[H, W]` or `[H, W, 3|1]` (floats in 0..1 or bytes), or a PIL image.
        routing: with the `grid` on which its tokens stand over the image.
        sample: which sample of the routing's batch the image is.
        max_carriers: at most so many carriers get a panel and a colour.
        title: above the picture; by default says how many tokens went to how many carriers.

    Returns:
        A matplotlib figure; `visualize.save` writes it.

    Raises:
        InvalidArgument: a routing without a grid, a sample it does not have, an image it cannot read.
        MissingExtra: without matplotlib.
    """
    check_positive(max_carriers=max_carriers)
    canvas = fit(to_image(image))
    maps = _maps_of(routing, sample)
    if keeps_tokens(routing):
        return _kept_figure(canvas, maps, title)
    if merges_tokens(routing):
        return _merged_figure(canvas, maps, routing, title)
    return _mixed_figure(canvas, maps, routing, max_carriers, title)


def gallery(
    images: Iterable[object],
    columns: Mapping[str, Routing],
    *,
    captions: Sequence[str] | None = None,
    below: Mapping[str, Sequence[str]] | None = None,
) -> "matplotlib.figure.Figure":
    """Several mechanisms on several images: a row for each image, and in it one picture for each routing.

    The pictures are `overlay`'s summary: kept tokens, or every token in the colour of the carrier with the greatest
    share of it. With more carriers than colours, colours repeat, though never in carriers that touch.

    Args:
        images: as `overlay` takes them, or a tensor `[B, 3|1, H, W]`.
        columns: a routing over the batch of these images, in their order, under the heading of its column.
        captions: a line for each image, to stand left of its row.
        below: a line for each picture of a column, to stand below it, by the column's heading ("image" of the first):
            the class that a model gives, say.

    Raises:
        InvalidArgument: a routing without grid or with fewer samples than images, no image, captions or lines of other
            number.
        MissingExtra: without matplotlib.
    """
    canvases = [fit(to_image(image, name=f"images[{i}]")) for i, image in enumerate(images)]
    if not canvases:
        raise InvalidArgument("images", expected="at least one image", got="none")
    if captions is not None and len(captions) != len(canvases):
        raise InvalidArgument("captions", expected=f"one for each of the {len(canvases)} images", got=len(captions))
    below = {"image": [""] * len(canvases), **dict.fromkeys(columns, [""] * len(canvases)), **(below or {})}
    for heading, lines in below.items():
        if heading not in ("image", *columns) or len(lines) != len(canvases):
            expected = f"for columns among {['image', *columns]} a line for each of the {len(canvases)} images"
            raise InvalidArgument("below", expected=expected, got=f"{len(lines)} for {heading!r}")
    ratios = [panel_ratio(canvas) for canvas in canvases]
    line = 0.25 + 0.14 * any(map(any, below.values()))
    figure = new_figure(PANEL * (1 + len(columns)) + 0.3, sum(PANEL * ratio + line for ratio in ratios) + 0.8)
    axes = figure.subplots(len(canvases), 1 + len(columns), squeeze=False, height_ratios=ratios)
    for row, canvas in enumerate(canvases):
        show_picture(axes[row][0], canvas)
        if captions is not None:
            axes[row][0].set_ylabel(fill(captions[row], 26), fontsize=9, color=INK)
        _write_below(axes[row][0], below["image"][row])
    set_heading(axes[0][0], "image", "")
    for column, (heading, routing) in enumerate(columns.items(), start=1):
        for row, canvas in enumerate(canvases):
            maps = _maps_of(routing, row, name=f"columns[{heading!r}]")
            show_picture(axes[row][column], _summary(canvas, maps, routing))
            kept = _kept_count(maps) if keeps_tokens(routing) else ""
            _write_below(axes[row][column], below[heading][row], kept)
        set_heading(axes[0][column], heading, _passage(routing))
    set_note(
        figure,
        "Colour: the carrier with the greatest share of the token; of merged tokens, their mean. Grey: dropped tokens.",
    )
    return figure


def _write_below(axis: Any, *lines: str) -> None:
    axis.set_xlabel(
        "\n".join(line if len(line) <= 30 else f"{line[:29]}…" for line in lines if line),
        fontsize=8,
        color=MUTED,
        labelpad=3,
    )


def describe(routing: Routing, *, sample: int = 0) -> str:
    """What `overlay` shows of one image, in a sentence, for those who do not see it.

    >>> describe(Routing(torch.eye(4)[None, None, :3], carriers="kept tokens", grid=(2, 2)))
    '3 of 4 tokens kept, 2 of them in the upper half of the image.'

    Args:
        routing: with the `grid` on which its tokens stand.
        sample: which sample of its batch.

    Raises:
        InvalidArgument: a routing without a grid, a sample it does not have.
    """
    maps = _maps_of(routing, sample)
    if keeps_tokens(routing):
        upper = int((maps.amax(0) > 0)[: (maps.shape[1] + 1) // 2].sum())
        return f"{_kept_count(maps)}, {upper} of them in the upper half of the image."
    if merges_tokens(routing):
        sizes = (maps > 0).sum((1, 2))
        lost = int((maps.amax(0) <= 0).sum())
        held = f"{maps[0].numel()} tokens merged to {int((sizes > 0).sum())}; the largest holds {int(sizes.max())}"
        return f"{held}, {lost} were dropped." if lost else f"{held}."
    parts = carried(maps)
    one = routing.carriers.removesuffix("s")
    most = parts.argsort(descending=True, stable=True)[:3].tolist()
    carry = ", ".join(f"{one} {carrier} carries {100 * parts[carrier]:.0f} % of the tokens" for carrier in most)
    return f"{_passage(routing)}: {carry}{', others less' if len(parts) > len(most) else ''}."


def _maps_of(routing: Routing, sample: int, name: str = "routing") -> Float[Tensor, "K h w"]:
    if routing.grid is None:
        raise InvalidArgument(
            name,
            expected="a routing whose tokens stand on a grid over the image",
            got="one without grid",
            hint="Place them with routing.with_grid((height, width)).",
        )
    batch = routing.weights.shape[0]
    if not 0 <= sample < batch:
        raise InvalidArgument("sample", expected=f"one of the {batch} samples of {name}, counted from 0", got=sample)
    return routing.maps()[sample].detach().float().cpu()


def _summary(canvas: Tensor, maps: Tensor, routing: Routing) -> Tensor:
    """One picture of all tokens: kept or dropped, or coloured by their owners."""
    if keeps_tokens(routing):
        return paint_kept(canvas, maps.amax(0) > 0)
    owner = owners(maps)
    if merges_tokens(routing):
        return paint_means(canvas, owner)
    own = {carrier: carrier for carrier in range(len(maps))} if len(maps) <= len(CARRIERS) else neighbour_colours(owner)
    return paint_owners(canvas, owner, {carrier: carrier_colour(rank) for carrier, rank in own.items()})


def _kept_count(maps: Tensor) -> str:
    keep = maps.amax(0) > 0
    return f"{int(keep.sum())} of {keep.numel()} tokens kept"


def _passage(routing: Routing) -> str:
    tokens = routing.weights.shape[-1] - routing.prefix
    if keeps_tokens(routing):
        return f"{tokens} tokens, kept or dropped"
    if merges_tokens(routing):
        return f"{tokens} tokens, merged to {routing.num_carriers - routing.prefix}"
    carriers = routing.carriers if routing.num_carriers > 1 else routing.carriers.removesuffix("s")
    return f"{tokens} tokens → {routing.num_carriers} {carriers}"


def _kept_figure(canvas: Tensor, maps: Tensor, title: str | None) -> "matplotlib.figure.Figure":
    figure = new_figure(4.0, 4.0 * panel_ratio(canvas) + 0.7)
    show_picture(figure.subplots(), paint_kept(canvas, maps.amax(0) > 0))
    set_title(figure, title or _kept_count(maps))
    set_note(figure, "Grey: dropped tokens.")
    return figure


def _merged_figure(canvas: Tensor, maps: Tensor, routing: Routing, title: str | None) -> "matplotlib.figure.Figure":
    figure = new_figure(7.6, 3.8 * panel_ratio(canvas) + 0.7)
    left, right = figure.subplots(1, 2)
    show_picture(left, canvas, "image")
    show_picture(right, paint_means(canvas, owners(maps)), "after merging")
    set_title(figure, title or _passage(routing))
    set_note(figure, "Each token in the mean colour of the tokens it was merged with. Grey: dropped tokens.")
    return figure


def _mixed_figure(
    canvas: Tensor, maps: Tensor, routing: Routing, max_carriers: int, title: str | None
) -> "matplotlib.figure.Figure":
    parts = carried(maps)
    # Rounded, so that carriers of equal share stay in order.
    shown = parts.mul(1e4).round().argsort(descending=True, stable=True)[:max_carriers].tolist()
    colours = {carrier: carrier_colour(rank) for rank, carrier in enumerate(sorted(shown))}
    one = routing.carriers.removesuffix("s")

    count = 2 + len(shown)
    rows = -(-count // PANELS_PER_ROW)
    columns = -(-count // rows)
    figure = new_figure(PANEL * columns, (PANEL * panel_ratio(canvas) + 0.28) * rows + 0.75)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    show_picture(axes[0], canvas, "image")
    show_picture(axes[1], paint_owners(canvas, owners(maps), colours), "owner of each token")
    for axis, (carrier, colour) in zip(axes[2:], colours.items(), strict=False):
        part = parts[carrier].item()
        name = f"{one} {carrier} · {part:.0%}" if part >= 0.095 else f"{one} {carrier} · {part:.1%}"
        show_picture(axis, paint_weights(canvas, maps[carrier], colour), name, colour)
    for axis in axes[count:]:
        axis.set_axis_off()
    set_title(figure, title or _passage(routing))
    note = (
        f"Owner: the {one} with the greatest share of the token. Maps: where each {one} reads, against its own "
        "maximum, and the part of all tokens it carries."
    )
    if len(shown) < len(maps):
        note += (
            f" Not shown, and grey: the other {len(maps) - len(shown)} of {len(maps)} {routing.carriers}; "
            "none carries more than these."
        )
    set_note(figure, note)
    return figure


NOBODY = -1


def keeps_tokens(routing: Routing) -> bool:
    """Whether every carrier reads one token at most: then tokens were kept or dropped, not mixed."""
    return bool((routing.maps() > 0).sum((-2, -1)).amax() <= 1)


def merges_tokens(routing: Routing) -> bool:
    """Whether carriers are tokens themselves, every token is in one at most, and one of them holds several."""
    read = routing.maps() > 0
    alone = bool(read.sum(1).amax() <= 1 and read.sum((-2, -1)).amax() > 1)
    return alone and routing.carriers.endswith("tokens")


def owners(maps: Float[Tensor, "K h w"]) -> Int[Tensor, "h w"]:
    """The carrier with the greatest share of each token, `NOBODY` where no carrier reads it."""
    share, carrier = maps.max(0)
    return carrier.masked_fill(share <= 0, NOBODY)


def carried(maps: Float[Tensor, "K h w"]) -> Float[Tensor, "K"]:
    """The part of all tokens that each carrier carries: shares normalised for each token, then averaged."""
    total = maps.sum(0)
    return (maps / total.masked_fill(total <= 0, 1)).mean((-2, -1))


def neighbour_colours(owner: Int[Tensor, "h w"]) -> dict[int, int]:
    """Greedy graph colouring: a colour number for every owner, different for owners that touch.

    There are fewer colours than carriers, but two that touch must not look like one.
    """
    pairs = torch.cat(
        [
            torch.stack([owner[:, :-1], owner[:, 1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1], owner[1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1, :-1], owner[1:, 1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1, 1:], owner[1:, :-1]], -1).flatten(0, 1),
        ]
    )
    touching: dict[int, set[int]] = {int(carrier): set() for carrier in owner.unique() if carrier != NOBODY}
    for a, b in pairs.unique(dim=0).tolist():
        if a != b and NOBODY not in (a, b):
            touching[a].add(b)
            touching[b].add(a)
    colours: dict[int, int] = {}
    for carrier, neighbours in touching.items():
        taken = {colours.get(neighbour) for neighbour in neighbours}
        colours[carrier] = next(number for number in range(len(touching)) if number not in taken)
    return colours
