"""The report is one page that says what was put in and needs nothing else."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from narrows.errors import InvalidArgument
from narrows.visualize import Cell, Report
from narrows.visualize.canvas import new_figure

VOID = {"meta"}


@dataclass
class Element:
    tag: str
    attributes: dict
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts).strip()


class Page(HTMLParser):
    """The elements of a page with the text inside each; raises where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.texts.append(data)

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


HOSTILE = "<script>alert('no & never')</script>\"'"


def full_report() -> Report:
    report = Report(
        f"Title {HOSTILE}",
        f"Subtitle {HOSTILE}",
        verdict=f"Verdict {HOSTILE}",
        facts={f"Fact {HOSTILE}": f"Found {HOSTILE}"},
    )
    report.section(f"Section {HOSTILE}")
    report.paragraph(f"Paragraph {HOSTILE}")
    report.table(
        ["model", "accuracy", f"cost {HOSTILE}", "note"],
        [
            ["vit", Cell(0.968, "96.8 ± 0.4 %"), 5120, HOSTILE],
            ["ats", Cell(0.961, "96.1 ± 0.6 %"), 311.5, None],
            ["lost", None, None, None],
        ],
        f"Caption {HOSTILE}",
        best={"accuracy": "max", f"cost {HOSTILE}": "min"},
        codes=[f"code {HOSTILE}", "", "two\nlines"],
    )
    figure = new_figure(2.0, 1.0)
    figure.text(0.5, 0.5, f"ink {HOSTILE}", color="#1f2328")
    report.figure(figure, f"Figure {HOSTILE}", alt=f"Alt {HOSTILE}")
    report.code(f"Code {HOSTILE}")
    return report


@pytest.fixture(scope="module")
def source() -> str:
    return full_report().html()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_all_texts_are_there_and_none_is_markup(page: Page) -> None:
    assert page.all("title")[0].text == page.all("h1")[0].text == f"Title {HOSTILE}"
    assert page.all("h2")[0].text == f"Section {HOSTILE}"
    assert [p.text for p in page.all("p")][:3] == [f"{w} {HOSTILE}" for w in ("Subtitle", "Verdict", "Paragraph")]
    assert page.all("p")[3].text.startswith(f"Caption {HOSTILE}")
    assert (page.all("dt")[0].text, page.all("dd")[0].text) == (f"Fact {HOSTILE}", f"Found {HOSTILE}")
    assert page.all("figcaption")[0].text == f"Figure {HOSTILE}"
    assert page.all("svg")[0].attributes["aria-label"] == f"Alt {HOSTILE}"
    assert page.all("text")[0].text == f"ink {HOSTILE}"
    assert page.all("code")[0].text == f"Code {HOSTILE}"
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0].text


def test_the_table_holds_its_numbers_and_what_to_sort_by(page: Page) -> None:
    headings = page.all("th")
    cells = [td for td in page.all("td") if td.attributes.get("class") != "copies"]
    assert [th.text for th in headings] == ["model", "accuracy", f"cost {HOSTILE}", "note"]
    assert [td.text for td in cells] == [
        *("vit", "96.8 ± 0.4 %", "5,120", HOSTILE),
        *("ats", "96.1 ± 0.6 %", "312", "–"),
        *("lost", "–", "–", "–"),
    ]
    values = [td.attributes.get("data-value") for td in cells]
    assert [None if value is None else float(value) for value in values] == [
        *(None, 0.968, 5120, None),
        *(None, 0.961, 311.5, None),
        *(None, None, None, None),
    ]
    assert [th.attributes.get("class") for th in headings] == [None, "number", "number", None]
    assert [th.attributes.get("data-first") for th in headings] == [None, "descending", None, None]
    assert [td.text for td in cells if "best" in td.attributes.get("class", "")] == ["96.8 ± 0.4 %", "312"]


def test_equal_best_values_are_all_marked() -> None:
    report = Report("Ties")
    report.table(["n"], [[1], [3], [3]], best={"n": "max"})
    marked = [td.text for td in Page(report.html()).all("td") if "best" in td.attributes.get("class", "")]
    assert marked == ["3", "3"]


def test_a_button_copies_the_code_of_its_row(page: Page) -> None:
    buttons = [button.attributes["data-code"] for button in page.all("button") if "data-code" in button.attributes]
    assert buttons == [f"code {HOSTILE}", "two\nlines", f"Code {HOSTILE}"]


def test_many_photographs_stay_below_two_megabytes() -> None:
    report, random = Report("Photographs"), np.random.default_rng(0)
    for _ in range(5):
        figure = new_figure(8.0, 4.0)
        for axes in figure.subplots(2, 4).ravel():
            axes.imshow(random.random((336, 336, 3)))
        report.figure(figure)
    assert 200_000 < len(report.html().encode()) < 2_000_000


def test_the_page_refers_to_nothing_outside_itself(source: str, page: Page) -> None:
    readable = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", readable, re.IGNORECASE)
    for element in page.elements:
        for name in ("src", "srcset", "href", "action"):
            assert element.attributes.get(name, "data:").startswith(("data:", "#"))
    policy = next(e for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy.attributes["content"]


def test_the_same_report_is_the_same_file(source: str) -> None:
    assert full_report().html() == source


def test_writing_makes_the_folder_and_returns_the_path(tmp_path: Path, source: str) -> None:
    path = full_report().write(tmp_path / "runs" / "now" / "report.html")
    assert path.read_text(encoding="utf-8") == source


def test_a_report_of_a_title_alone_is_a_page() -> None:
    page = Page(Report("Nothing yet").html())
    assert page.all("h1")[0].text == "Nothing yet"
    assert not page.all("p")


def test_mistakes_are_named(tmp_path: Path) -> None:
    report = Report("Mistakes")
    with pytest.raises(InvalidArgument, match=r"path: expected a file name ending in \.html, got .*report\.txt"):
        report.write(tmp_path / "report.txt")
    with pytest.raises(InvalidArgument, match=r"rows\[0\]: expected 2 cells"):
        report.table(["a", "b"], [[1]])
    with pytest.raises(InvalidArgument, match=r"best: expected names among the columns \['a'\], got 'b'"):
        report.table(["a"], [[1]], best={"b": "max"})
    with pytest.raises(InvalidArgument, match="codes: expected one for each of the 1 rows, got 2"):
        report.table(["a"], [[1]], codes=["x", "y"])
    with pytest.raises(InvalidArgument, match="best: expected 'max' or 'min' for each column, got 'most' for 'a'"):
        report.table(["a"], [[1]], best={"a": "most"})
