"""Writes the state-dict keys of every layer case and every registry model anew: `python -m tests.snapshots`."""

import json
from pathlib import Path

import torch

from narrows.models import create_model, list_models
from tests.cases import all_cases

HERE = Path(__file__).parent


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def write(name: str, content: dict[str, dict[str, list[int]]]) -> None:
    (HERE / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


write("layer_state_dict_keys.json", {case.name: shapes(case.build()) for case in all_cases()})
with torch.device("meta"):
    write(
        "model_state_dict_keys.json",
        {name: shapes(create_model(name)) for name in [*list_models(), *list_models(task="objects")]},
    )
