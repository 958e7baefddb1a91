"""Pictures as people have them become what an image viewer shows."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narrows.data.decoding import begins_like_an_image, decode_image, why_unreadable
from narrows.errors import DataError
from tests.data.folders import write_image
from tests.support import needs

RAMP = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)


def _decoded(image: Image.Image, suffix: str = ".png", **options: Any) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    decoded = decode_image(file, "picture")
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        ((RAMP * 65535).astype(np.uint16), ".png"),
        ((RAMP * 65535).astype(np.uint16), ".tiff"),
        ((RAMP * 65535).astype(">u2"), ".tiff"),
        ((RAMP * 65535).astype(np.int32), ".tiff"),
        (((RAMP - 0.5) * 1e9).astype(np.int32), ".tiff"),
        (RAMP, ".tiff"),
        (RAMP * 255, ".tiff"),
        (RAMP * 5000 - 17, ".tiff"),
    ],
)
def test_a_ramp_stays_a_ramp(pixels: np.ndarray, suffix: str) -> None:
    decoded = _decoded(Image.fromarray(pixels), suffix)
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded[..., 0] - 255 * RAMP).max() <= 1


def test_dark_pictures_stay_dark_and_numbers_that_are_none_are_black() -> None:
    assert _decoded(Image.fromarray(np.full((4, 4), 4095, np.uint16))).max() == 16
    assert _decoded(Image.fromarray(RAMP[:8] / 2), ".tiff").max() < 20
    strange = RAMP.copy()
    strange[0, :3] = np.nan, np.inf, -np.inf
    assert (_decoded(Image.fromarray(strange), ".tiff")[0, :3] == 0).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGBA", ".png", {}),
        ("RGBA", ".webp", {"lossless": True}),
        ("LA", ".png", {}),
        ("RGBA", ".tiff", {}),
        ("P", ".gif", {"transparency": 0}),
        ("P", ".png", {"transparency": 0}),
        ("L", ".png", {"transparency": 0}),
        ("RGB", ".png", {"transparency": (0, 0, 0)}),
    ],
)
def test_transparent_pixels_are_shown_over_white(mode: str, suffix: str, options: dict[str, Any]) -> None:
    assert (_decoded(Image.new(mode, (4, 4), 0), suffix, **options) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert np.abs(_decoded(Image.new("RGBA", (4, 4), (200, 0, 0, 128))).astype(int) - (227, 127, 127)).max() <= 1


def test_of_an_animation_the_first_frame_is_shown() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    decoded = _decoded(frames[0], ".gif", save_all=True, append_images=frames[1:])
    assert decoded[0, 0].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_exif_record_counts_as_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for cut in range(6, len(whole)):
        path = tmp_path / "photo.jpg"
        Image.new("RGB", (8, 4)).save(path, exif=whole[:cut] + b"\xff" * (len(whole) - cut))
        assert why_unreadable(path) is None
        assert decode_image(path, "photo").size in ((8, 4), (4, 8))


def test_only_formats_of_pictures_are_decoded_whatever_the_name_says(tmp_path: Path) -> None:
    path = tmp_path / "harmless.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(DataError, match=r"harmless cannot be read as an image: it is none of JPEG, PNG"):
        decode_image(path, "harmless")
    assert "none of JPEG" in (why_unreadable(path) or "")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".ppm"])
def test_files_without_an_extension_are_known_by_their_first_bytes(tmp_path: Path, suffix: str) -> None:
    if suffix == ".avif":
        needs("pillow", "11.3")
    image = write_image(tmp_path / f"picture{suffix}")
    image = image.rename(tmp_path / "picture")
    assert begins_like_an_image(image)
    assert why_unreadable(image) is None
    image.write_text("GIF is a format")
    assert not begins_like_an_image(image)
    assert not begins_like_an_image(tmp_path / "missing")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_what_would_start_a_program_or_fill_the_memory_is_not_decoded(tmp_path: Path) -> None:
    size = (60_000).to_bytes(4, "big") * 2
    bomb = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size + b"\x01\0\0\0\0") + _chunk(b"IDAT", zlib.compress(bytes(99)))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name, content, message in (
        ("bomb", bomb, "DecompressionBomb"),
        ("postscript", postscript, "it is none of JPEG"),
    ):
        file = tmp_path / f"{name}.png"
        file.write_bytes(content)
        assert message in (why_unreadable(file) or "")
        with pytest.raises(DataError, match=message):
            decode_image(file, "picture")
