"""What other packages bring by entry points: methods and hosts, looked up by name and loaded when asked for."""

import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from narrows.errors import InvalidArgument, NarrowsError

METHODS = "narrows.methods"
HOSTS = "narrows.hosts"


class WithPlugins(Mapping[str, Any]):
    """A mapping by name, and after it the entry points of a group; each is loaded when it is asked for.

    Args:
        own: of narrows.
        group: of the entry points.
    """

    def __init__(self, own: Mapping[str, Any], group: str) -> None:
        self._own, self._group = own, group

    @property
    def plugins(self) -> Mapping[str, EntryPoint]:
        """The entry points alone, by name.

        Raises:
            InvalidArgument: two packages bring the same name, or one that narrows has.
        """
        return _found(self._group, tuple(self._own), tuple(sys.path))

    def __getitem__(self, name: str) -> Any:
        return self._own[name] if name in self._own else _loaded(self.plugins[name])

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.plugins

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self.plugins

    def __len__(self) -> int:
        return len(self._own) + len(self.plugins)


@cache
def _found(group: str, taken: Collection[str], _path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """By name; `_path` is where packages are looked for."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in taken or found.get(entry.name, entry).value != entry.value:
            raise InvalidArgument(
                f"entry point {entry.name!r} of {_package(entry)}",
                expected=f"a name in {group!r} that is not taken",
                got=f"one of {'narrows' if entry.name in taken else _package(found[entry.name])}",
                hint="Uninstall one of the two packages.",
            )
        found[entry.name] = entry
    return found


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # somebody else's package
        raise NarrowsError(
            f"{entry.value}, which {_package(entry)} brings as {entry.name!r} in {entry.group!r}, could not be loaded "
            f"({type(error).__name__}: {error})."
        ) from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "a package"
