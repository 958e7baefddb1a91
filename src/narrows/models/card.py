"""Model cards: README.md beside saved weights, with what is known of a model and nothing else."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

CLASSES_SHOWN = 20


def model_card(
    model: nn.Module,
    name: str,
    *,
    task: str,
    code: str,
    rows: Mapping[str, str],
    tags: Sequence[str] = (),
    library: str = "narrows",
) -> ModelCard:
    """A card of what is known: what the model is, figures of it, and the code that loads it.

    Args:
        model: its class says in its docstring what it does.
        name: heading.
        task: as the Hugging Face hub calls it: "image-classification".
        code: Python that loads it.
        rows: of the table: what is known, by what it is called.
        tags: for the hub's search; what `huggingface_hub` adds says nothing of a model.
        library: whose the model is, for the hub.
    """
    about = " ".join((type(model).__doc__ or "").split("\n\n")[0].split())
    known = {
        "Task": task.replace("-", " "),
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        **rows,
    }
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in known.items())
    data = ModelCardData(library_name=library, pipeline_tag=task, tags=[tag for tag in tags if "mixin" not in tag])
    head = f"---\n{data.to_yaml()}\n---\n\n# {_cell(name)}\n\n"
    text = f"{head}{about}\n\n| | |\n|---|---|\n{table}\n\n## Use it\n\n```python\n{code}\n```\n"
    return ModelCard(text, ignore_metadata_errors=False)


def timm_card(model: Any, name: str, rows: Mapping[str, str]) -> ModelCard:
    """A card of a model of timm's, with timm's code."""
    architecture = model.pretrained_cfg.get("architecture", type(model).__name__)
    code = f'import timm\n\nmodel = timm.create_model("local-dir:{name}", pretrained=True)'
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    known = {"Architecture": f"{architecture} of timm", **rows}
    return model_card(model, name, task=task, code=code, rows=known, tags=["narrows", "timm"], library="timm")


def named_classes(classes: Sequence[str]) -> dict[str, str]:
    """The row of a card that names classes, the first of many; none where they are not known."""
    if not classes:
        return {}
    shown = ", ".join(classes[:CLASSES_SHOWN])
    return {"Classes": f"{len(classes)}: {shown}{' and others' if len(classes) > CLASSES_SHOWN else ''}"}


def _cell(value: Any) -> str:
    """A text in a cell of a Markdown table: no markup, one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", " ".join(str(value).split()))
