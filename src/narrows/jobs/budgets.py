"""Budgets as people write them in a shell."""

import re

from torch import Tensor

from narrows.adapters.token_reduction import TargetLatency, TargetMACs
from narrows.adapters.token_reduction.targets import Budget
from narrows.errors import InvalidArgument

_TARGET = re.compile(r"(\d+(?:\.\d+)?)(ms|[MGT])(?:MACs?)?")
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}


def parse_budget(text: str, images: Tensor | None = None) -> Budget:
    """A share ("0.5"), a count ("98"), a target ("2.9G" MACs, "40ms" for a batch), or block by block ("3:0.7/6:0.49").

    >>> parse_budget("0.5"), parse_budget("98"), parse_budget("3:0.7/6:96")
    (0.5, 98, {3: 0.7, 6: 96})

    Args:
        text: what was written.
        images: the calibration batch of a target.

    Raises:
        InvalidArgument: it is none of these.
    """
    text = text.strip()
    try:
        if target := _TARGET.fullmatch(text):
            number, unit = float(target[1]), target[2]
            if unit == "ms":
                return TargetLatency(number / 1e3, images)
            return TargetMACs(number * _UNITS[unit], images)
        if ":" in text:
            return {int(block): _number(entry) for block, entry in (part.split(":") for part in text.split("/"))}
        return _number(text)
    except ValueError as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            "budget",
            expected="a share (0.5), a count (98), a target (2.9G MACs, 40ms), or block:share/block:share",
            got=repr(text),
        ) from None


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
