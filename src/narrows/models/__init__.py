"""Whole networks, by name: `create_model`, `list_models`, `load_model`."""

from narrows.models.ats_vit import ATSViT
from narrows.models.base import ImageClassifier
from narrows.models.registry import create_model, list_models, load_model
from narrows.models.sepvit import SepViT

__all__ = ["ATSViT", "ImageClassifier", "SepViT", "create_model", "list_models", "load_model"]
