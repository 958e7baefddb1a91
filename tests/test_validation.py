"""Which modules are plain; numbers that are checked in one place; which devices there are."""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.validation import check_device, check_positive_number, why_not_plain


def with_lora(module: nn.Linear) -> nn.Module:
    model = nn.Sequential(module)
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)[0]


def with_lora_on_the_weight(module: nn.Linear) -> nn.Module:
    config = peft.LoraConfig(r=2, target_parameters=["0.weight"])
    return peft.inject_adapter_in_model(config, nn.Sequential(module))[0]


def quantised(module: nn.Linear) -> nn.Module:
    model = nn.Sequential(module)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def hooked(register: str) -> Callable[[nn.Linear], nn.Module]:
    def hook(module: nn.Linear) -> nn.Module:
        getattr(module, register)(lambda *_: None)
        return module

    return hook


def with_another_forward(module: nn.Linear) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


class Subclass(nn.Linear):
    """Might compute anything."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_lora, "is a peft.tuners.lora.layer.Linear"),
        (with_lora_on_the_weight, "is a peft"),
        (quantised, "weight is a Int8Tensor"),
        (lambda module: bitsandbytes.nn.Linear8bitLt(4, 3), "is a bitsandbytes.nn.modules.Linear8bitLt"),
        (lambda module: Subclass(4, 3), "Subclass"),
        (parametrizations.weight_norm, "ParametrizedLinear"),
        (parametrizations.spectral_norm, "ParametrizedLinear"),
        (nn.utils.spectral_norm, "has hooks"),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), "has hooks"),
        (lambda module: cpu_offload(module, torch.device("cpu")), "forward was replaced"),
        (hooked("register_forward_hook"), "has hooks"),
        (hooked("register_forward_pre_hook"), "has hooks"),
        (hooked("register_full_backward_hook"), "has hooks"),
        (hooked("register_full_backward_pre_hook"), "has hooks"),
        (with_another_forward, "forward was replaced"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_put_on_or_in_a_module_is_seen(change: Callable[[nn.Linear], nn.Module], reason: str) -> None:
    changed = change(nn.Linear(4, 3))
    found = why_not_plain([("to_k", changed)])
    assert found is not None
    assert found.startswith("to_k")
    assert reason in found


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.0, InvalidArgument),
        (float("inf"), InvalidArgument),
        (float("nan"), InvalidArgument),
        ("1", InvalidType),
        (True, InvalidType),
    ],
    ids=str,
)
def test_a_temperature_is_positive_and_finite(value: Any, error: type[NarrowsError]) -> None:
    with pytest.raises(error, match="temperature: expected a positive number, got "):
        check_positive_number(temperature=value)
    for fine in (1, 0.5, np.float32(0.5)):
        check_positive_number(temperature=fine)


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.LayerNorm(4), nn.GRUCell(4, 4), nn.RMSNorm(4)], ids=repr)
def test_modules_of_torch_are_plain(module: nn.Module) -> None:
    assert why_not_plain([("", module)]) is None
    assert why_not_plain([("", module.double().requires_grad_(False).eval())]) is None


def test_hooks_that_were_removed_are_forgotten() -> None:
    module = nn.Linear(4, 3)
    handle = module.register_forward_hook(lambda *_: None)
    handle.remove()
    assert why_not_plain([("", module)]) is None


def test_devices_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert check_device("auto") == check_device("cpu") == torch.device("cpu")
    for name, expected in {
        "cuda": "'cpu' or 'auto' on a machine without CUDA, got 'cuda'",
        "cuda:0": "without CUDA",
        "mps": "without MPS",
        "cuda:x": "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'cuda:x'",
        "cuda:-1": "'auto', 'cpu'",
        "": "'auto', 'cpu'",
    }.items():
        with pytest.raises(InvalidArgument, match=f"^device: expected .*{expected}"):
            check_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = {name: check_device(name) for name in ("auto", "cpu", "cuda", "cuda:1", "mps")}
    assert {name: str(device) for name, device in found.items()} == {**{n: n for n in found}, "auto": "cuda"}
    with pytest.raises(InvalidArgument, match="expected 'cuda:0' to 'cuda:1', which this machine has, got 'cuda:2'"):
        check_device("cuda:2")
