"""A figure in a page: its ink is the page's, its texts are texts, its pictures are as large as there is room."""

import io
import re
from base64 import b64decode
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from narrows.routing import Routing
from narrows.visualize import ParetoPoint, curves, gallery, pareto
from narrows.visualize.canvas import INK, new_figure
from narrows.visualize.drawing import draw, encode


def test_black_and_grey_are_the_colours_of_the_page_and_others_stay() -> None:
    figure = new_figure(2.0, 2.0)
    figure.suptitle("ink", color=INK)
    figure.subplots().plot([0, 1], [0, 1], color="#d55e00", marker="o", markerfacecolor="white")
    figure.set_layout_engine("none")  # a second layout moves things a little
    drawn = draw(figure, alt="A line.", name="a")
    styles = " ".join(re.findall('style="([^"]*)"', drawn.svg))
    assert set(re.findall("#[0-9a-f]{6}", styles)) == {"#d55e00"}
    assert {"var(--ink)", "var(--card)"} <= set(re.findall(r"var\(--\w+\)", styles))
    assert draw(figure, alt="A line.", name="a") == drawn, "the same figure is the same drawing"


def test_texts_stay_texts_and_none_is_markup() -> None:
    name = "<b>&\"' \x1b[31m"
    figure = pareto([ParetoPoint(name, 1.0, 2.0)], x="cost", y="quality")
    root = ElementTree.fromstring(draw(figure, alt=name, name="a").svg)
    readable = name.replace("\x1b", "\ufffd")
    assert readable in [text.text for text in root.iter("text")]
    assert root.attrib["aria-label"] == readable
    (title,) = root.iter("title")
    assert title.text.strip() == f"{readable} · quality: 2 · cost: 1.00"


def test_every_point_of_a_chart_says_what_it_is() -> None:
    lines = {"ats": [ParetoPoint("ats 0.5", 50, 94.5, note="9 images/s"), ParetoPoint("ats 0.7", 70e6, 94.8, 0.4)]}
    figure = curves(lines, ParetoPoint("untouched", 1e8, 95), x="MACs", y="accuracy (%)")
    root = ElementTree.fromstring(draw(figure, alt="", name="a").svg)
    titles = [" ".join(group.find("title").text.split()) for group in root.iter("g") if group.get("class") == "point"]
    assert titles == [
        "untouched · accuracy (%): 95 · MACs: 100.00 M",
        "ats 0.5 · accuracy (%): 94.5 · MACs: 50.00 · 9 images/s",
        "ats 0.7 · accuracy (%): 94.8 ± 0.4 · MACs: 70.00 M",
    ]


def test_names_of_parts_are_unique_in_a_page_and_lead_to_their_parts() -> None:
    figure = pareto([ParetoPoint("a", 1.0, 2.0, 0.5), ParetoPoint("b", 2.0, 3.0, 0.5)], x="cost", y="quality")
    seen: set[str] = set()
    for name in ("f1", "f2"):
        svg = draw(figure, alt="", name=name).svg
        own = re.findall(' id="([^"]*)"', svg)
        assert len(own) == len(set(own))
        assert not seen & set(own)
        led = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
        assert led
        assert set(led) <= set(own)
        seen |= set(own)


def noise() -> torch.Tensor:
    return torch.rand(2, 3, 448, 448, generator=torch.Generator().manual_seed(0))


def test_each_picture_stands_once_in_a_drawing() -> None:
    images = noise()
    drawn = draw(gallery(images, {"slots": Routing(torch.ones(2, 1, 1, 4), "slots", grid=(2, 2))}), alt="", name="a")
    assert len(drawn.pictures) == 4, "two images and where their tokens went"
    urls = encode(drawn.pictures, 10**9)
    filled = drawn.filled(urls)
    assert [filled.count(url) for url in urls] == [1, 1, 1, 1]
    first = Image.open(io.BytesIO(b64decode(urls[0].partition(",")[2]))).convert("RGB")
    assert first.format is None
    assert min(first.size) > 200


def test_pictures_get_smaller_until_they_are_below_the_limit() -> None:
    files = []
    for image in noise():
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(file, format="png")
        files.append(file.getvalue())
    large = encode(files, 10**9)
    small = encode(files, sum(map(len, large)) // 2)
    assert sum(map(len, small)) <= sum(map(len, large)) / 2 + 100
    sides = [Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).width for url in (large[0], small[0])]
    assert sides[0] == 448
    assert sides[1] < 448


def test_flat_colours_are_kept_without_loss() -> None:
    flat = np.zeros((64, 64, 3), np.uint8)
    flat[16:32, 16:48] = (213, 94, 0)
    file = io.BytesIO()
    Image.fromarray(flat).save(file, format="png")
    (url,) = encode([file.getvalue()], 10**6)
    again = Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).convert("RGB")
    assert np.array_equal(np.asarray(again), flat)
