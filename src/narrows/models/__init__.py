"""Whole networks, by name: `create_model`, `list_models`, `load_model`."""

from narrows.models.ats_vit import ATSViT
from narrows.models.base import ImageClassifier
from narrows.models.features import FeaturePyramid
from narrows.models.pyramid import PyramidNetwork
from narrows.models.registry import create_model, list_models, load_model
from narrows.models.segmenter import Segmenter
from narrows.models.sepvit import SepViT, UpstreamSepViT
from narrows.models.timm_hook import register_in_timm

__all__ = [
    "ATSViT",
    "FeaturePyramid",
    "ImageClassifier",
    "PyramidNetwork",
    "Segmenter",
    "SepViT",
    "UpstreamSepViT",
    "create_model",
    "list_models",
    "load_model",
]

register_in_timm()
