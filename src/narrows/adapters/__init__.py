"""Other people's models, taken as they are."""

from narrows.adapters.token_reduction import Reduction, TargetLatency, TargetMACs, reduce_tokens

__all__ = ["Reduction", "TargetLatency", "TargetMACs", "reduce_tokens"]
