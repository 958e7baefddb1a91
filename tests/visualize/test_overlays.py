"""Overlays and galleries show what the routing says, pixel by pixel."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from narrows import visualize
from narrows.errors import InvalidArgument, MissingExtra
from narrows.routing import Routing
from narrows.visualize.canvas import CARRIERS, to_rgb
from narrows.visualize.overlays import NOBODY, carried, keeps_tokens, neighbour_colours, owners

HEIGHT, WIDTH = 4, 6
GREY = torch.full((3, 40, 60), 0.5)


def slots(number: int = 5, batch: int = 2) -> Routing:
    return Routing((4 * torch.randn(batch, 2, number, HEIGHT * WIDTH)).softmax(2), "slots", (HEIGHT, WIDTH))


def kept(*tokens: int, prefix: int = 1) -> Routing:
    weights = torch.zeros(1, 1, len(tokens) + 2, prefix + HEIGHT * WIDTH)
    weights[0, 0, 0, 0] = 1  # the class token; the last carrier stays empty
    for carrier, token in enumerate(tokens, start=1):
        weights[0, 0, carrier, prefix + token] = 1
    return Routing(weights, "kept tokens", (HEIGHT, WIDTH), prefix=prefix)


def panels(figure: Figure) -> list[Tensor]:
    """The pictures as shown, `[H, W, 3]` each."""
    return [torch.from_numpy(np.asarray(image.get_array())) for axes in figure.axes for image in axes.images]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center") if axes.get_title(loc)]


def at_tokens(picture: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """The pixel in the middle of each token, `[h, w, 3]`."""
    rows = ((torch.arange(height) + 0.5) * picture.shape[0] / height).long()
    columns = ((torch.arange(width) + 0.5) * picture.shape[1] / width).long()
    return picture[rows][:, columns]


def nearest_carrier(pixels: Tensor) -> Tensor:
    """Which carrier's colour a pixel has, by its hue alone."""

    def hue(colours: Tensor) -> Tensor:
        low, high = colours.amin(-1, keepdim=True), colours.amax(-1, keepdim=True)
        return (colours - low) / (high - low)

    palette = hue(torch.stack([to_rgb(colour) for colour in CARRIERS]))
    return (hue(pixels)[..., None, :] - palette).norm(dim=-1).argmin(-1)


def is_grey(pixels: Tensor) -> Tensor:
    return pixels.amax(-1) - pixels.amin(-1) < 1e-5


def test_owner_panel_has_the_colour_of_the_greatest_share_at_every_token() -> None:
    routing = slots()
    figure = visualize.overlay(GREY, routing, sample=1)
    expected = routing.weights[1].mean(0).argmax(0).view(HEIGHT, WIDTH)
    assert torch.equal(nearest_carrier(at_tokens(panels(figure)[1])), expected)


def test_first_panel_is_the_image() -> None:
    image = torch.rand(3, 448, 448)
    assert torch.equal(panels(visualize.overlay(image, slots()))[0], image.movedim(0, -1))


def test_map_panel_is_coloured_where_its_carrier_reads_and_grey_where_it_does_not() -> None:
    weights = torch.zeros(1, 1, 2, HEIGHT * WIDTH)
    weights[0, 0, 0, 8:] = 0.1
    weights[0, 0, 1, 0], weights[0, 0, 1, 5] = 0.2, 0.05
    pictures = panels(visualize.overlay(GREY, Routing(weights, "latents", (HEIGHT, WIDTH))))
    pixels = at_tokens(pictures[3])
    colourfulness = pixels.amax(-1) - pixels.amin(-1)
    read = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    read[0, 0] = read[0, 5] = True
    assert nearest_carrier(pixels)[0, 0] == 1
    assert colourfulness[~read].max() < 0.02 * colourfulness[0, 0]  # half a pixel beyond the reach of the map
    assert colourfulness[0, 5].item() == pytest.approx(colourfulness[0, 0].item() / 4, rel=0.1)


def test_tokens_that_nobody_reads_stay_grey_in_the_owner_panel() -> None:
    routing = slots(batch=1)
    routing.weights[..., 7:11] = 0
    pixels = at_tokens(panels(visualize.overlay(GREY, routing))[1]).flatten(0, 1)
    assert is_grey(pixels[7:11]).all()
    assert not is_grey(pixels[:7]).any()


def test_of_many_carriers_those_that_carry_most_are_shown_and_the_others_counted() -> None:
    weights = torch.zeros(1, 1, 32, HEIGHT * WIDTH)
    chosen = [3, 8, 30, 17]
    for rank, carrier in enumerate(chosen):
        weights[0, 0, carrier, 6 * rank : 6 * rank + 5] = 0.3
    weights[0, 0, 1, 5], weights[0, 0, 2, 11] = 0.9, 0.9  # greater weights, fewer tokens
    figure = visualize.overlay(GREY, Routing(weights, "expert slots", (HEIGHT, WIDTH)), max_carriers=4)
    shown = [int(match[1]) for title in titles(figure) if (match := re.match(r"expert slot (\d+) · 21%", title))]
    assert shown == sorted(chosen)
    assert "the other 28 of 32 expert slots" in figure.get_supxlabel().replace("\n", " ")
    owner = at_tokens(panels(figure)[1]).flatten(0, 1)
    assert is_grey(owner[[5, 11, 17, 23]]).all()
    assert nearest_carrier(owner[[0, 6, 12, 18]]).tolist() == [0, 1, 3, 2]


def test_nothing_is_said_to_be_hidden_when_all_is_shown() -> None:
    assert "Not shown" not in visualize.overlay(GREY, slots(8)).get_supxlabel()


def test_kept_tokens_look_as_they_are_and_dropped_ones_are_dimmed(tmp_path: Path) -> None:
    tokens = [0, 8, 9, 23]
    image = 0.6 + 0.4 * torch.rand(3, 40, 60)
    routing = kept(*tokens)
    path = visualize.save(visualize.overlay(image, routing), tmp_path / "kept.png")
    assert Image.open(path).format == "PNG"

    figure = visualize.overlay(image, routing)
    (picture,) = panels(figure)
    keep = torch.zeros(HEIGHT * WIDTH, dtype=torch.bool)
    keep[tokens] = True
    pixels = at_tokens(picture).flatten(0, 1)
    original = at_tokens(panels(visualize.overlay(image, slots()))[0]).flatten(0, 1)
    assert torch.equal(pixels[keep], original[keep])
    assert pixels[keep].mean(-1).min() > pixels[~keep].mean(-1).max()
    assert figure.get_suptitle() == "4 of 24 tokens kept"


def test_dropped_background_is_told_from_kept_background_on_black() -> None:
    pixels = at_tokens(panels(visualize.overlay(torch.zeros(1, 32, 32), kept(0, 1)))[0]).flatten(0, 1)
    assert (pixels[0] - pixels[5]).abs().max() > 0.1


def test_merged_tokens_have_the_mean_colour_of_what_they_hold() -> None:
    image = torch.zeros(3, 4, 8)
    image[:, :, :2], image[0, :, 4:], image[:, :, 2:4] = 1.0, 0.5, 0.2
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]])[None, None]  # two merged, one alone, one dropped
    routing = Routing(weights, carriers="kept tokens", grid=(1, 4))
    figure = visualize.overlay(image, routing)
    assert figure._suptitle.get_text() == "4 tokens, merged to 2"  # pyright: ignore
    painted = panels(figure)[1]
    size = painted.shape[1] // 4
    first, second, third, fourth = (painted[painted.shape[0] // 2, i * size + size // 2] for i in range(4))
    assert torch.allclose(first, torch.full((3,), 0.6))
    assert torch.equal(first, second)
    assert torch.allclose(third, torch.tensor([0.5, 0, 0]))
    assert not torch.allclose(fourth, torch.tensor([0.5, 0, 0]))
    dropped = Routing(weights.clone(), carriers="windows", grid=(1, 4))
    assert "merged" not in visualize.overlay(image, dropped)._suptitle.get_text()  # pyright: ignore


def test_owners_are_outlined_against_each_other() -> None:
    weights = torch.zeros(1, 1, 2, HEIGHT * WIDTH).unflatten(-1, (HEIGHT, WIDTH))
    weights[:, :, 0, :, :3], weights[:, :, 1, :, 3:] = 1, 1
    picture = panels(visualize.overlay(GREY, Routing(weights.flatten(-2), "windows", (HEIGHT, WIDTH))))[1]
    white = (picture == 1).all(-1)
    middle = picture.shape[1] // 2
    assert white[:, middle - 1 : middle + 1].all()
    assert not white[:, : middle - 4].any()
    assert not white[:, middle + 4 :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_and_gradients_do_not_matter(dtype: torch.dtype) -> None:
    routing = slots()
    exact = Routing(routing.weights.to(dtype), "slots", routing.grid)
    attached = Routing(exact.weights.clone().requires_grad_(), "slots", routing.grid)
    for a, b in zip(panels(visualize.overlay(GREY, exact)), panels(visualize.overlay(GREY, attached)), strict=True):
        assert torch.equal(a, b)


def test_title_says_how_many_tokens_went_to_how_many_carriers_unless_given() -> None:
    assert visualize.overlay(GREY, slots(5)).get_suptitle() == "24 tokens → 5 slots"
    assert visualize.overlay(GREY, slots(1)).get_suptitle() == "24 tokens → 1 slot"
    assert visualize.overlay(GREY, slots(5), title="A grey image").get_suptitle() == "A grey image"


def test_nothing_written_reaches_beyond_the_picture() -> None:
    figures = [
        visualize.overlay(torch.rand(3, 64, 16), slots(1), title="a long title " * 9),
        visualize.overlay(GREY, kept(1, 2), title="a long title " * 9),
        visualize.overlay(GREY, slots(30)),
        visualize.gallery([GREY], {"slots": slots()}, captions=["a caption that is longer than its image is high"]),
    ]
    for figure in figures:
        figure.canvas.draw()
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert figure.bbox.contains(box.x0, box.y0), text.get_text()
                assert figure.bbox.contains(box.x1, box.y1), text.get_text()


def test_gallery_holds_the_summary_of_each_routing_for_each_image() -> None:
    images = torch.rand(2, 3, 20, 30)
    a, b = slots(batch=2), slots(20, batch=2)
    figure = visualize.gallery(images, {"slot_vit": a, "soft_moe_vit": b}, captions=["first", "second"])
    pictures = panels(figure)
    assert len(pictures) == 6
    for row in range(2):
        owner = a.weights[row].mean(0).argmax(0).view(HEIGHT, WIDTH)
        assert torch.equal(nearest_carrier(at_tokens(pictures[3 * row + 1])), owner)
        many = b.weights[row].mean(0).argmax(0).view(HEIGHT, WIDTH)
        pixels = nearest_carrier(at_tokens(pictures[3 * row + 2]))
        beside = many[:, 1:] != many[:, :-1]
        assert (pixels[:, 1:] != pixels[:, :-1])[beside].all()
    assert titles(figure) == ["image", "slot_vit", "soft_moe_vit"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["first", "second"]


def test_gallery_counts_kept_tokens_below_each_picture() -> None:
    weights = torch.cat([kept(0, 1, 2).weights, kept(5, 5, 6).weights])
    figure = visualize.gallery([GREY, GREY], {"ats": Routing(weights, "kept tokens", (HEIGHT, WIDTH), prefix=1)})
    assert [axes.get_xlabel() for axes in figure.axes[1::2]] == ["3 of 24 tokens kept", "2 of 24 tokens kept"]


def test_gallery_writes_below_each_picture_what_it_is_told() -> None:
    below = {"image": ["cat", "dog"], "kept": ["a very long name of a class of animals", "dog ✓"]}
    batch = Routing(kept(0, 1).weights.expand(2, -1, -1, -1), "kept tokens", (HEIGHT, WIDTH), prefix=1)
    figure = visualize.gallery([GREY, GREY], {"kept": batch, "slots": slots()}, below=below)
    lines = [axes.get_xlabel() for axes in figure.axes]
    assert lines == [
        *("cat", "a very long name of a class o…\n2 of 24 tokens kept", ""),
        *("dog", "dog ✓\n2 of 24 tokens kept", ""),
    ]
    for wrong in ({"kept": ["one"]}, {"other": ["a", "b"]}):
        with pytest.raises(
            InvalidArgument, match=r"below: expected for columns among \['image', 'kept'\] a line for each"
        ):
            visualize.gallery([GREY, GREY], {"kept": batch}, below=wrong)


def test_what_is_seen_is_said() -> None:
    assert visualize.describe(kept(0, 1, 18)) == "3 of 24 tokens kept, 2 of them in the upper half of the image."
    merged = torch.eye(24)[:20]
    merged[3, 20:23] = 1
    routing = Routing(merged[None, None], "kept tokens", (HEIGHT, WIDTH))
    assert visualize.describe(routing) == "24 tokens merged to 20; the largest holds 4, 1 were dropped."
    shares = torch.tensor([0.1, 0.6, 0.3, 0.0]).view(1, 1, 4, 1).expand(1, 1, 4, 24)
    assert visualize.describe(Routing(shares, "slots", (HEIGHT, WIDTH))) == (
        "24 tokens → 4 slots: slot 1 carries 60 % of the tokens, slot 2 carries 30 % of the tokens, "
        "slot 0 carries 10 % of the tokens, others less."
    )


def test_a_routing_without_grid_is_refused_with_the_way_to_give_one() -> None:
    routing = Routing(torch.ones(1, 1, 2, 9), "slots")
    with pytest.raises(InvalidArgument, match=r"routing: .*grid.*routing\.with_grid\(\(height, width\)\)"):
        visualize.overlay(GREY, routing)
    with pytest.raises(InvalidArgument, match=r"columns\['slot_vit'\]: .*grid"):
        visualize.gallery([GREY], {"slot_vit": routing})


@pytest.mark.parametrize("sample", [2, -1])
def test_a_sample_that_is_not_there_is_refused(sample: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"sample: expected one of the 2 samples of routing.*got {sample}"):
        visualize.overlay(GREY, slots(), sample=sample)


def test_more_images_than_samples_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"one of the 2 samples of columns\['a'\].*got 2"):
        visualize.gallery([GREY] * 3, {"a": slots()})


def test_other_mistakes_are_named() -> None:
    with pytest.raises(InvalidArgument, match="max_carriers: expected a positive integer, got 0"):
        visualize.overlay(GREY, slots(), max_carriers=0)
    with pytest.raises(InvalidArgument, match="images: expected at least one image, got none"):
        visualize.gallery([], {"a": slots()})
    with pytest.raises(InvalidArgument, match="captions: expected one for each of the 2 images, got 1"):
        visualize.gallery([GREY] * 2, {"a": slots()}, captions=["one"])
    with pytest.raises(InvalidArgument, match=r"images\[1\]: expected values in 0..1"):
        visualize.gallery([GREY, GREY * 9], {"a": slots()})


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"matplotlib is needed to draw pictures.*narrows\[viz\]"):
        visualize.overlay(GREY, slots())


def test_pictures_drawn_in_threads_are_the_same() -> None:
    routing = slots(batch=4)

    def draw(sample: int) -> np.ndarray:
        figure = visualize.overlay(GREY, routing, sample=sample, max_carriers=2)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())

    alone = [draw(sample) for sample in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_matplotlib_is_loaded_when_drawing_and_pyplot_never() -> None:
    program = """
import sys, torch
from narrows import visualize
from narrows.routing import Routing
assert "matplotlib" not in sys.modules
visualize.overlay(torch.zeros(1, 8, 8), Routing(torch.ones(1, 1, 2, 4), "slots", (2, 2)))
visualize.pareto([visualize.ParetoPoint("a", 1, 2)], x="x", y="y")
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_owner_of_a_token_has_its_greatest_share_and_unread_tokens_have_none() -> None:
    maps = torch.tensor([[[0.2, 0.9], [0.0, 0.5]], [[0.7, 0.1], [0.0, 0.6]]])
    assert owners(maps).tolist() == [[1, 0], [NOBODY, 1]]


def test_what_a_carrier_carries_counts_every_read_token_once() -> None:
    # Softmax over tokens, as in a soft mixture of experts: rows sum to 1, so row sums alone say nothing.
    maps = torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]]])
    torch.testing.assert_close(carried(maps), torch.tensor([1.5 / 4, 1.5 / 4]))
    lopsided = torch.tensor([[[0.1, 0.1, 0.8, 0.0]], [[0.9, 0.1, 0.0, 0.0]]])
    torch.testing.assert_close(carried(lopsided), torch.tensor([(0.1 + 0.5 + 1) / 4, (0.9 + 0.5) / 4]))


def one_hot(*tokens: int | None, total: int = 7) -> torch.Tensor:
    weights = torch.zeros(1, 1, len(tokens), total)
    for carrier, token in enumerate(tokens):
        if token is not None:
            weights[0, 0, carrier, token] = 1
    return weights


def test_one_token_per_carrier_means_kept() -> None:
    assert keeps_tokens(Routing(one_hot(0, 3, None, 6), "kept tokens", (2, 3), prefix=1))
    mixed = one_hot(0, 3, 6)
    mixed[0, 0, 1, 4] = 0.1
    assert not keeps_tokens(Routing(mixed, "slots", (2, 3), prefix=1))


def test_heads_that_keep_different_tokens_mix_them() -> None:
    weights = torch.cat([one_hot(1, 2), one_hot(2, 3)], dim=1)
    assert not keeps_tokens(Routing(weights, "latents", (2, 3), prefix=1))


def test_one_mixing_sample_makes_the_batch_a_mixing_one() -> None:
    weights = torch.cat([one_hot(1, 2), one_hot(3, 4)])
    weights[1, 0, 0] = 1 / 7
    assert not keeps_tokens(Routing(weights, "slots", (2, 3), prefix=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_owners_that_touch_never_share_a_colour(height: int, width: int, carriers: int, seed: int) -> None:
    owner = torch.randint(NOBODY, carriers, (height, width), generator=torch.Generator().manual_seed(seed))
    colours = neighbour_colours(owner)
    assert set(colours) == set(owner.unique().tolist()) - {NOBODY}
    for i in range(height):
        for j in range(width):
            for k, m in ((i, j + 1), (i + 1, j), (i + 1, j + 1), (i + 1, j - 1)):
                if (
                    k < height
                    and 0 <= m < width
                    and owner[i, j] != owner[k, m]
                    and NOBODY not in (owner[i, j], owner[k, m])
                ):
                    assert colours[int(owner[i, j])] != colours[int(owner[k, m])]


def test_sixty_four_windows_need_four_colours() -> None:
    rows = torch.arange(8).repeat_interleave(7)
    owner = rows[:, None] * 8 + rows[None]
    assert set(neighbour_colours(owner).values()) == {0, 1, 2, 3}
