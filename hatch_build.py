"""What a package says of itself outside the repository: README with whole addresses, and where the project is.

`NARROWS_REPOSITORY=https://github.com/<owner>/narrows python -m build` makes it so; without the address, links stay as
they are in a clone.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\[\]]*\])\((?!\w+:|#)([^)]+)\)")


def whole_addresses(text: str, repository: str, version: str) -> str:
    """Markdown whose links to files of the repository are addresses of this version, pictures as they are shown.

    >>> whole_addresses("![seen](docs/a.png) and [read](docs/a.md#b)", "https://github.com/o/n", "1.0")
    '![seen](https://github.com/o/n/raw/v1.0/docs/a.png) and [read](https://github.com/o/n/blob/v1.0/docs/a.md#b)'
    """

    def whole(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}{link[2]}({repository}/{kind}/v{version}/{link[3]})"

    return _LINK.sub(whole, text)


class Addresses(MetadataHookInterface):
    """Hatchling's hook."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README, and the addresses where one is known."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("NARROWS_REPOSITORY", "").rstrip("/")
        if repository:
            version = re.findall(r'"(.+)"', Path(self.root, "src/narrows/_version.py").read_text(encoding="utf-8"))[-1]
            text = whole_addresses(text, repository, version)
            changes = f"{repository}/blob/v{version}/CHANGELOG.md"
            metadata["urls"] = {"Source": repository, "Issues": f"{repository}/issues", "Changes": changes}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
