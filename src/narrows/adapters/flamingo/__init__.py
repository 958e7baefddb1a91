"""Any causal language model of transformers made to read media, by gated cross attention from outside."""

from narrows.adapters.flamingo.model import Flamingo
from narrows.adapters.flamingo.presets import PRESETS

__all__ = ["PRESETS", "Flamingo"]
