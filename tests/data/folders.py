"""Small folders of images."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """A random picture; the suffix says in which format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """`root/<class>/<number>.png` for each class."""
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(root / name / f"{index:03}{suffix}", seed=1000 * number + index)
    return root


def truncate(path: Path) -> Path:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
