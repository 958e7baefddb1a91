"""The house is as CONTRIBUTING says: short roads, and nothing that asks which machine it runs on."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import narrows
from narrows import DynamicSlotsSoftMoE, MaskedCrossAttention, PerceiverResampler, SeparableAttention, SlotAttention
from narrows.cli import main
from tests.hub.small_models import save_images, save_ours

SOURCE = Path(narrows.__file__).parent


def files_passed(call: Callable[[], object], *, warm_up: bool = True) -> set[str]:
    """The files of narrows that a call runs through; without `warm_up` what it imports has to be there already."""
    if warm_up:
        call()
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            found.add(str(Path(frame.f_code.co_filename).relative_to(SOURCE)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_slot_attention_passes_at_most_seven_files(impl: str) -> None:
    layer, tokens = SlotAttention(32, num_slots=3, impl=impl), torch.randn(2, 20, 32)
    passed = files_passed(lambda: layer(tokens, torch.ones(2, 20, dtype=torch.bool)))
    assert len(passed) <= 7, sorted(passed)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (PerceiverResampler(16, depth=2), (torch.randn(2, 9, 16),)),
        (SeparableAttention(16, heads=2, window_size=3), (torch.randn(2, 6, 6, 16),)),
        (DynamicSlotsSoftMoE(16, num_experts=3), (torch.randn(2, 9, 16),)),
        (MaskedCrossAttention(16), (torch.randn(2, 5, 16), torch.randn(2, 3, 4, 16))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_passes_few_files(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    passed = files_passed(lambda: layer(*inputs))
    assert len(passed) <= 8, sorted(passed)


def test_a_reduction_passes_at_most_eight_files_of_the_command(tmp_path: Path) -> None:
    """Of the rooms of commands and jobs; adapters, measures and pictures are what the job is about."""
    model, images = save_ours(tmp_path / "model"), save_images(tmp_path / "images")
    options = ["--method", "topk", "--budget", "0.5", "--device", "cpu", "--output", str(tmp_path / "runs")]
    options += ["--limit", "4"]
    importlib.import_module("narrows.cli.commands")
    importlib.import_module("narrows.jobs.reduce")
    passed = files_passed(lambda: main(["reduce", "--model", model, "--data", images, *options]), warm_up=False)
    assert "jobs/reduce.py" in passed
    own = {path for path in passed if path.partition("/")[0] in ("cli", "jobs", "demo", "training", "hub")}
    assert len(own) <= 8, sorted(own)


def test_nothing_asks_which_processor_it_runs_on() -> None:
    asks = re.compile(r"cpuinfo|cpu_capability|torch\._C\b|torch\.ops\.mkl|backends\.mkl|platform\.processor")
    # Benchmarks record where they ran, and `narrows info` shows it: nothing follows from either.
    records = {Path("bench/rows.py"), Path("cli/info.py")}
    asking = [
        path.relative_to(SOURCE)
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE) not in records and asks.search(path.read_text(encoding="utf-8"))
    ]
    assert not asking
