"""SepViT: the network of the paper, and beside it the form that `vit-pytorch` published."""

from narrows.models.sepvit.network import SepViT
from narrows.models.sepvit.presets import PRESETS, UPSTREAM_PRESETS
from narrows.models.sepvit.upstream import UpstreamSepViT

__all__ = ["PRESETS", "UPSTREAM_PRESETS", "SepViT", "UpstreamSepViT"]
