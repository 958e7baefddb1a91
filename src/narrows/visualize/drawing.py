"""A figure as SVG inside a page: its ink follows the page, and its points say what they are."""

import io
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from narrows.visualize.canvas import DPI, INK, LINE, MUTED, PAPER

if TYPE_CHECKING:
    import matplotlib.figure

POINT = "point: "
"""How the gid of an artist begins that shows the rest of its gid where it is pointed at."""
_PAGE_COLOURS = {
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
}
WIDE = 720
"""Pixels beyond which a figure is scrolled on a phone and not shrunk."""
_PLACE = "picture {} of this drawing"
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_SCALES = (1.0, 0.75, 0.55, 0.4, 0.28)


class Drawing(NamedTuple):
    """A figure as SVG.

    Args:
        svg: the element, with a place for each picture.
        pictures: PNG.
        width: in pixels of a page.
    """

    svg: str
    pictures: tuple[bytes, ...]
    width: int

    def filled(self, urls: Sequence[str]) -> str:
        """The element with these addresses of its pictures."""
        svg = self.svg
        for number, url in enumerate(urls):
            svg = svg.replace(f'"{_PLACE.format(number)}"', f'"{url}"')
        return svg


def draw(figure: "matplotlib.figure.Figure", *, alt: str, name: str) -> Drawing:
    """A figure as SVG for a page.

    Black, white and grey are `var(--ink)`, `var(--muted)`, `var(--line)` and `var(--card)`; texts stay texts.

    Args:
        figure: as it is now.
        alt: what is seen, for those who do not see it.
        name: not that of another drawing of the page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A fixed salt: the same figure is the same text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "narrows"}):
        figure.savefig(buffer, format="svg", dpi=DPI, transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(_NO_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    wanted = set(re.findall(r"#([^\s\")]+)", " ".join(v for each in root.iter() for v in each.attrib.values())))
    pictures: list[bytes] = []
    for element in root.iter():
        _adapt(element, name, wanted, pictures)
    width = round(figure.get_figwidth() * 96)
    root.attrib.update(
        {"role": "img", "aria-label": _NO_XML.sub("\N{REPLACEMENT CHARACTER}", alt), "width": str(width)}
    )
    root.attrib["class"] = "drawing wide" if width > WIDE else "drawing"
    root.attrib.pop("height")
    root.attrib.pop("version")
    return Drawing(ElementTree.tostring(root, encoding="unicode"), tuple(pictures), width)


def _adapt(element: ElementTree.Element, name: str, wanted: set[str], pictures: list[bytes]) -> None:
    """Make an element of matplotlib's one of the page."""
    element.tag = element.tag.rpartition("}")[2]
    given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    own = given.pop("id", "")
    if own.startswith(POINT):
        given["class"] = "point"
        title = ElementTree.Element("title")
        title.text = own.removeprefix(POINT)
        element.insert(0, title)
    elif own in wanted:
        given["id"] = f"{name}-{own}"
    for key, value in given.items():
        if value.startswith("data:image/png;base64,"):
            given[key] = _PLACE.format(len(pictures))
            pictures.append(b64decode(value.partition(",")[2]))
        elif key == "href":
            given[key] = value.replace("#", f"#{name}-", 1)
        elif key in ("style", "fill", "stroke", "clip-path"):
            value = value.replace("url(#", f"url(#{name}-")
            value = re.sub("#[0-9a-f]{6}", lambda found: _PAGE_COLOURS.get(found[0], found[0]), value)
            given[key] = re.sub(r"'DejaVu Sans'(, '?[\w .]+'?)+", "'DejaVu Sans', Verdana, sans-serif", value)
    element.attrib.clear()
    element.attrib.update(given)


def encode(pictures: Sequence[bytes], limit: int) -> list[str]:
    """PNGs as addresses of WebPs, made smaller where they would be more than `limit` bytes together."""
    opened = [_opened(picture) for picture in pictures]
    found: list[bytes] = []
    for scale in _SCALES:
        found = [_webp(picture, scale) for picture in opened]
        if sum(map(len, found)) * 4 / 3 <= limit:
            break
    return [f"data:image/webp;base64,{b64encode(picture).decode()}" for picture in found]


def _opened(picture: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    return image if image.getchannel("A").getextrema() != (255, 255) else image.convert("RGB")


def _webp(image: Any, scale: float) -> bytes:
    """The smaller of both kinds: flat colours are smaller without loss."""
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size])
    files = []
    for options in ({"lossless": True}, {"quality": 85}):
        buffer = io.BytesIO()
        image.save(buffer, format="webp", **options)
        files.append(buffer.getvalue())
    return min(files, key=len)
