"""Other people's models, taken as they are."""

from narrows.adapters.flamingo import Audit, audit
from narrows.adapters.token_reduction import Reduction, TargetLatency, TargetMACs, reduce_tokens

__all__ = ["Audit", "Reduction", "TargetLatency", "TargetMACs", "audit", "reduce_tokens"]
