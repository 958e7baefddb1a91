"""Reads one picture of any kind, grey or coloured, 8 or 16 bits, transparent or not, as 8-bit RGB."""

import contextlib
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from narrows.data.tables import Row
from narrows.errors import DataError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""What names of image files end in, in lower case."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded, by content, whatever the name says. Pillow would also run Ghostscript on a PostScript file."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P4\n", b"P5\n", b"P6\n")


def decode_image(source: Path | Row | BytesIO, name: str) -> Image.Image:
    """A picture as RGB, rotated as its EXIF orientation says; errors call it `name`.

    16-bit pixels are divided by 257, so that a ramp stays a ramp. Floating-point pixels are taken to lie in 0..1, or in
    0..255 if one exceeds 1; where they leave that range, and for 32-bit integers, the least becomes black and the
    greatest white. Transparent pixels are shown over white. Of an animation this is the first frame. A damaged EXIF
    record counts as none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(readable(source), formats=_formats()) as image:
            image.load()
            return _to_rgb(_upright(image))
    except Exception as error:  # a broken file makes decoders raise anything
        raise DataError(f"{name} cannot be read as an image: {_reason(error)}") from error


def why_unreadable(source: Path | Row) -> str | None:
    """Why a picture cannot be decoded, or None. JPEG is decoded at an eighth of its size, which is much faster."""
    try:
        with Image.open(readable(source), formats=_formats()) as image:
            image.draft("L", (1, 1))
            image.load()
            if image.mode not in ("L", "RGB"):
                _to_rgb(image)
    except Exception as error:  # a broken file makes decoders raise anything
        return _reason(error)
    return None


def begins_like_an_image(path: Path) -> bool:
    """Whether the first bytes of a file without an extension are those of an image format."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP") or start[4:12] == b"ftypavif"


def readable(source: Path | Row | BytesIO) -> Path | BytesIO:
    return source.open() if isinstance(source, Row) else source


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # an older Pillow has no AVIF


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(_formats())}"
    return f"{type(error).__name__}: {error}"


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged record makes its parser raise anything
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_bytes(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey pixels of more than 8 bits as 8 bits."""
    if mode.startswith("I;16"):
        return np.rint(pixels / 257).astype(np.uint8)
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0)
    least, greatest = float(values.min()), float(values.max())
    if mode == "F" and least >= 0 and greatest <= 255:
        least, greatest = 0.0, 1.0 if greatest <= 1 else 255.0
    elif mode == "I" and least >= 0 and greatest <= 65535:  # how some versions of Pillow open 16-bit files
        least, greatest = 0.0, 65535.0
    return np.rint((values - least) * (255 / max(greatest - least, 1e-12))).astype(np.uint8)
