"""Whole networks, by name: `create_model`, `list_models`, `load_model`."""

from narrows.models.base import ImageClassifier
from narrows.models.features import FeaturePyramid, PyramidNetwork
from narrows.models.object_discovery import ObjectDiscovery, ObjectDiscoveryOutput
from narrows.models.registry import create_model, list_models, load_model
from narrows.models.segmenter import Segmenter
from narrows.models.sepvit import SepViT
from narrows.models.upstream_sepvit import UpstreamSepViT
from narrows.models.vit import ATSViT, ResamplerViT, SlotViT, SoftMoEViT, ViT

__all__ = [
    "ATSViT",
    "FeaturePyramid",
    "ImageClassifier",
    "ObjectDiscovery",
    "ObjectDiscoveryOutput",
    "PyramidNetwork",
    "ResamplerViT",
    "Segmenter",
    "SepViT",
    "SlotViT",
    "SoftMoEViT",
    "UpstreamSepViT",
    "ViT",
    "create_model",
    "list_models",
    "load_model",
]
