"""The carriers' colours stay apart for every kind of colour vision."""

from itertools import combinations

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from narrows.visualize.palette import CARRIERS, carrier_colour, to_hex, to_rgb

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


def test_hex_and_numbers_are_each_others_inverse() -> None:
    assert to_rgb("#ff8000").tolist() == pytest.approx([1, 128 / 255, 0])
    assert [to_hex(to_rgb(colour)) for colour in CARRIERS] == list(CARRIERS)


def test_a_second_round_of_carriers_gets_lighter_shades() -> None:
    first, second = to_rgb(carrier_colour(2)), to_rgb(carrier_colour(2 + len(CARRIERS)))
    assert (second > first).all()
    assert len({carrier_colour(rank) for rank in range(2 * len(CARRIERS))}) == 2 * len(CARRIERS)
