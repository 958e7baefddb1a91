"""Random numbers that are a pure function of what they are for: no state, so nothing to save and nothing to restore."""

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)


def keys(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One key for each combination of the parts (broadcast): close parts give unrelated keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + _STEP + np.asarray(part).astype(np.uint64))
    return key


def uniforms(key: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """`count` uniform numbers in [0, 1) for each of B keys: `[B, count]`, the same whichever other keys are asked."""
    words = _mix(key[:, None] + _STEP * np.arange(1, -(-count // 2) + 1, dtype=np.uint64))
    halves = words.view(np.uint32)[:, :count] >> np.uint32(8)
    return halves.astype(np.float32) * np.float32(2**-24)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on a counter.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
