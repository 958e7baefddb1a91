"""The paper's three sizes (Alayrac et al. 2022, tables 1 and 5), as arguments of `Flamingo`.

Each beside a language model of Chinchilla's shape and an NFNet-F6 whose maps are 1536 wide. The paper's counts of
parameters are rounded and its own formulas give slightly others; `docs/flamingo.md` has both.
"""

from typing import Any

_RESAMPLER = {"depth": 6, "num_latents": 64, "heads": 16, "head_dim": 96, "activation": "squared_relu"}


def _size(every: int | tuple[int, ...], heads: int) -> dict[str, Any]:
    block = {"heads": heads, "head_dim": 128, "activation": "squared_relu"}
    return {"media_dim": 1536, "every": every, "resampler": dict(_RESAMPLER), "block": block}


PRESETS: dict[str, dict[str, Any]] = {
    "flamingo_3b": _size(1, 16),
    "flamingo_9b": _size(4, 32),
    # Twelve blocks at 80 layers: the first layer counts.
    "flamingo_80b": _size(tuple(range(0, 80, 7)), 64),
}
