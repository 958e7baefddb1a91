from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.soft_moe import ExpertList, StackedExperts, make_experts
from narrows.models import create_model, load_model
from tests.support import assert_close, gradients


class CountOperations(TorchDispatchMode):
    """How many operations reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def one_by_one(experts: StackedExperts, slots: Tensor) -> Tensor:
    outputs = []
    for e in range(slots.shape[1]):
        hidden = F.linear(slots[:, e], experts.expand.weight[e], experts.expand.bias[e])
        if experts.gated:
            half = hidden.shape[-1] // 2
            hidden = hidden[..., :half] * F.gelu(hidden[..., half:])
        else:
            hidden = F.gelu(hidden)
        outputs.append(F.linear(hidden, experts.contract.weight[e], experts.contract.bias[e]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
def test_stacked_experts_are_the_experts_one_by_one(kind: str) -> None:
    experts = StackedExperts(6, 3, kind=kind, mult=2.5).double()
    slots = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = experts(slots), one_by_one(experts, slots)
    assert_close(ours, theirs, 1e-12)
    tensors = (slots, *experts.parameters())
    for a, b in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
def test_the_number_of_operations_does_not_grow_with_the_number_of_experts(kind: str) -> None:
    counts = []
    for num_experts in (4, 64):
        experts, slots = (
            StackedExperts(8, num_experts, kind=kind),
            torch.randn(2, num_experts, 1, 8, requires_grad=True),
        )
        with CountOperations() as operations:
            experts(slots).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_dropout_is_for_training_only() -> None:
    experts, slots = StackedExperts(8, 2, dropout=0.5), torch.randn(2, 2, 3, 8)
    assert not torch.equal(experts(slots), experts(slots))
    experts.eval()
    assert_close(experts(slots), one_by_one(experts, slots), 1e-6)


def test_any_module_is_an_expert_and_knows_its_number() -> None:
    experts = make_experts(lambda index: nn.Linear(4, 4, bias=index == 0), 4, 2, mult=4.0, dropout=0.0)
    assert isinstance(experts, ExpertList)
    assert experts[0].bias is not None
    assert experts[1].bias is None
    slots = torch.randn(3, 2, 5, 4)
    assert_close(experts(slots), torch.stack([experts[0](slots[:, 0]), experts[1](slots[:, 1])], 1), 1e-6)


def test_a_gated_expert_has_as_many_parameters_as_a_plain_one() -> None:
    counts = [sum(p.numel() for p in StackedExperts(96, 2, kind=kind).parameters()) for kind in ("gelu", "geglu")]
    assert abs(counts[0] - counts[1]) < 0.01 * counts[0]


def test_each_expert_starts_like_a_linear_layer_of_its_own() -> None:
    experts = StackedExperts(64, 8)
    for weight, fan_in in ((experts.expand.weight, 64), (experts.contract.weight, 256)):
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def as_saved_before(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys and the layout that experts were saved with up to this release: weights `[out, E, in]`."""
    older = {}
    for name, value in state.items():
        place, _, last = name.rpartition("experts.")
        if place or name.startswith("experts."):
            which, kind = last.split(".")
            last = f"{kind}_{'in' if which == 'expand' else 'out'}"
            value = value.transpose(0, 1) if kind == "weight" else value
        older[f"{place}experts.{last}" if last != name else name] = value.contiguous()
    return older


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
@pytest.mark.parametrize("num_experts", [3, 4], ids=["", "as many experts as features"])
def test_experts_saved_in_the_older_layout_still_open(num_experts: int, kind: str) -> None:
    saved = nn.ModuleDict({"experts": StackedExperts(4, num_experts, kind=kind, mult=1.5 if kind == "geglu" else 1)})
    older = as_saved_before(saved.state_dict())
    assert older.keys() == {"experts.weight_in", "experts.bias_in", "experts.weight_out", "experts.bias_out"}
    opened = nn.ModuleDict({"experts": StackedExperts(4, num_experts, kind=kind, mult=1.5 if kind == "geglu" else 1)})
    opened.load_state_dict(older)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    again = opened.state_dict()
    deepcopy(opened).load_state_dict(again)
    assert older.keys() == {"experts.weight_in", "experts.bias_in", "experts.weight_out", "experts.bias_out"}


def test_a_folder_of_a_model_saved_in_the_older_layout_still_opens(tmp_path: Path) -> None:
    model = create_model("soft_moe_vit_mini").eval()
    model.save_pretrained(tmp_path)
    save_file(as_saved_before(model.state_dict()), tmp_path / "model.safetensors")
    opened = load_model(tmp_path)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"experts: expected one of \('gelu', 'geglu'\), got 'relu'"):
        make_experts("relu", 4, 2, mult=4.0, dropout=0.0)
    with pytest.raises(InvalidArgument, match=r"dropout: expected a share from 0 to below 1, got 1.5"):
        StackedExperts(4, 2, dropout=1.5)
    with pytest.raises(
        InvalidArgument, match=r"expert_mult: expected a multiple of dim that leaves a hidden width, got 0.1"
    ):
        StackedExperts(4, 2, mult=0.1)


def test_a_module_in_place_of_a_function_is_named() -> None:
    with pytest.raises(
        InvalidType, match=r"experts: .*got ModuleList. From a list of modules: experts=modules.__getitem__"
    ):
        make_experts(nn.ModuleList([nn.Identity()]), 4, 1, mult=4.0, dropout=0.0)  # type: ignore[arg-type]
