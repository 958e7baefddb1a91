"""Whole networks, by name: `create_model`, `list_models`, `load_model`."""

from narrows.models.base import ImageClassifier
from narrows.models.registry import create_model, list_models, load_model

__all__ = ["ImageClassifier", "create_model", "list_models", "load_model"]
