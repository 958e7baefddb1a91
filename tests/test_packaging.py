"""What a wheel says of itself, where no repository stands around it."""

import os
import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from narrows import __version__

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("repository", ["https://example.org/someone/narrows/", ""])
def test_readme_has_whole_addresses_where_the_repository_is_known(repository: str, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    environment = os.environ | {"NARROWS_REPOSITORY": repository}
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        (place,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(place).decode())
    text, written = str(metadata.get_payload()), (ROOT / "README.md").read_text(encoding="utf-8")
    if not repository:
        assert text.strip() == written.strip()
        assert metadata.get_all("Project-URL") is None
        return
    base = "https://example.org/someone/narrows"
    ours = re.findall(rf"(!?)\[[^\]]*\]\({base}/(raw|blob)/v{re.escape(__version__)}/([^)#]+)", text)
    assert len(ours) > 20
    assert all((ROOT / path).exists() for _, _, path in ours)
    assert {(picture, kind) for picture, kind, _ in ours} == {("!", "raw"), ("", "blob")}
    assert not re.findall(r"\]\((?!https?://|#)", text), "a link that a clone alone has"
    assert metadata.get_all("Project-URL")[0] == f"Source, {base}"
