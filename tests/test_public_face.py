"""What `import narrows` brings, and what it leaves alone."""

import subprocess
import sys

import pytest

import narrows

HEAVY = (
    "lightning",
    "torchmetrics",
    "torchvision",
    "timm",
    "transformers",
    "matplotlib",
    "PIL",
    "gradio",
    "sklearn",
    "onnx",
    "triton",
)


def test_import_loads_nothing_and_what_is_used_loads_torch_and_little_else() -> None:
    script = (
        "import sys, narrows; print('torch' in sys.modules); import torch; before = set(sys.modules); "
        "print([bool(getattr(narrows, name)) for name in narrows.__all__ if name != 'Flamingo'].count(False)); "
        f"print([name for name in {HEAVY} if name in sys.modules.keys() - before])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.split("\n")[:3] == ["False", "0", "[]"]


def test_names_mean_the_same_whichever_module_was_imported_first() -> None:
    script = "import narrows.costs.speed; assert callable(narrows.measure), narrows.measure"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        narrows.nothing  # noqa: B018  # pyright: ignore


@pytest.mark.parametrize("name", narrows.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert getattr(narrows, name).__doc__ or name == "__version__"


def test_constructors_take_at_most_a_dozen_arguments() -> None:
    import inspect

    from torch import nn

    layers = [getattr(narrows.layers, name) for name in narrows.layers.__all__]
    counts = {
        layer.__name__: len(set(inspect.signature(layer).parameters) - {"device", "dtype"})
        for layer in layers
        if isinstance(layer, type) and issubclass(layer, nn.Module)
    }
    assert counts
    assert not {name: count for name, count in counts.items() if count > 12}
