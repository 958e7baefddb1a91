"""The attention of the Perceiver resampler, and the time embeddings of what it reads."""

from narrows.ops.perceiver_resampler.api import IMPLEMENTATIONS, perceiver_attention, perceiver_attention_weights
from narrows.ops.perceiver_resampler.time import time_embeddings
from narrows.ops.perceiver_resampler.weights import PerceiverAttentionWeights

__all__ = [
    "IMPLEMENTATIONS",
    "PerceiverAttentionWeights",
    "perceiver_attention",
    "perceiver_attention_weights",
    "time_embeddings",
]
