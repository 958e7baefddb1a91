"""Figures become files, for light and for dark pages."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from narrows import visualize
from narrows.errors import InvalidArgument
from narrows.visualize.canvas import new_figure, render
from narrows.visualize.palette import INK

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".jpg": b"\xff\xd8", ".webp": b"RIFF"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_suffix_chooses_the_format_and_folders_are_made(tmp_path: Path, suffix: str) -> None:
    path = visualize.save(new_figure(1.0, 1.0), tmp_path / "new" / "folder" / f"figure{suffix.upper()}")
    assert path.read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize("name", ["figure.bmpp", "figure"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"path: expected a file name ending in one of .*\.png.*{name}"):
        visualize.save(new_figure(1.0, 1.0), tmp_path / name)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")) / 255


def test_the_dark_picture_has_light_ink_and_the_same_colours_and_leaves_the_figure_as_it_was() -> None:
    figure = new_figure(2.0, 2.0)
    figure.suptitle("ink", color=INK, fontsize=40)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#d55e00", marker="o", markerfacecolor="white")
    figure.set_layout_engine("none")
    before = render(figure)
    assert render(figure) == before
    light, dark = map(pixels, before)

    for picture in (light, dark):
        assert picture[0, 0, 3] == 0, "no background"
    opaque = (light[..., 3] == 1) & (dark[..., 3] == 1)
    ink = opaque & (np.abs(light[..., :3] - np.array([0x1F, 0x23, 0x28]) / 255).max(-1) < 0.01)
    line = opaque & (np.abs(light[..., :3] - np.array([0xD5, 0x5E, 0x00]) / 255).max(-1) < 0.01)
    assert ink.sum() > 100
    assert line.sum() > 100
    assert dark[ink][:, :3].min() > 0.8
    # Where the line is drawn over ink, its edge may round differently.
    np.testing.assert_allclose(dark[line], light[line], rtol=0, atol=1.01 / 255)


def test_light_and_dark_lie_exactly_over_each_other_and_the_layout_stays_alive() -> None:
    figure = new_figure(2.0, 2.0)
    figure.suptitle("a title", fontsize=30)
    figure.subplots().set_xlabel("a label")
    light, dark = map(pixels, render(figure))
    np.testing.assert_array_equal(light[..., 3], dark[..., 3])
    assert figure.get_layout_engine() is not None
