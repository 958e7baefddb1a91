"""Figures become files, in colours that can be told apart."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from skimage.color import deltaE_ciede2000, rgb2lab

from narrows import visualize
from narrows.errors import InvalidArgument
from narrows.visualize.canvas import (
    CARRIERS,
    carrier_colour,
    new_figure,
    set_heading,
    set_title,
    to_hex,
    to_rgb,
)

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".jpg": b"\xff\xd8", ".webp": b"RIFF"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_suffix_chooses_the_format_and_folders_are_made(tmp_path: Path, suffix: str) -> None:
    path = visualize.save(new_figure(1.0, 1.0), tmp_path / "new" / "folder" / f"figure{suffix.upper()}")
    assert path.read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize("name", ["figure.bmpp", "figure"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"path: expected a file name ending in one of .*\.png.*{name}"):
        visualize.save(new_figure(1.0, 1.0), tmp_path / name)


# Machado, Oliveira and Fernandes (2009), "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# severity 1, for linear RGB.
VISION = {
    "full": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
def test_no_two_carriers_look_alike(vision: str) -> None:
    colours = np.stack([to_rgb(colour).double().numpy() for colour in CARRIERS])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.asarray(VISION[vision]).T, 0, 1)
    seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[None])[0]
    # A difference of 10 is seen at a glance (CIEDE2000; 1 is just noticeable).
    assert min(deltaE_ciede2000(lab[i], lab[j]) for i, j in combinations(range(len(CARRIERS)), 2)) > 10


def test_hex_and_rgb_are_inverse() -> None:
    assert to_rgb("#ff8000").tolist() == pytest.approx([1, 128 / 255, 0])
    assert [to_hex(to_rgb(colour)) for colour in CARRIERS] == list(CARRIERS)


def test_a_second_round_of_carriers_gets_lighter_shades() -> None:
    first, second = to_rgb(carrier_colour(2)), to_rgb(carrier_colour(2 + len(CARRIERS)))
    assert (second > first).all()
    assert len({carrier_colour(rank) for rank in range(2 * len(CARRIERS))}) == 2 * len(CARRIERS)


@pytest.mark.parametrize("name", ["US$ and $", "$\\frac{", "a $b$ c"])
def test_dollar_signs_in_names_are_no_formulas(name: str) -> None:
    figure = new_figure(3.0, 3.0)
    axes = figure.subplots()
    set_title(figure, name)
    set_heading(axes, name, name)
    axes.set_xticks([0.5], [name])
    axes.plot([0, 1], [0, 1], label=name)
    axes.legend()
    figure.canvas.draw()
    assert all(not text.get_parse_math() for text in figure.findobj(Text))
    visualize.pareto([visualize.ParetoPoint(name, 1.0, 2.0)], x=name, y=name, title=name).canvas.draw()
