"""What `from_upstream` promises of every module it converts, alone and inside a model."""

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument, InvalidType
from tests.checkpoints.upstream.cases import CASES, Case
from tests.support import assert_close, assert_within_budget, gradients

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Model(nn.Module):
    """A model that calls an upstream module as upstream's is called, between parts of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.gain = nn.Identity(), inner, nn.Parameter(torch.tensor(1.5))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = self.inner(self.before(args[0]), *args[1:], **kwargs)
        return tuple(self.gain * each for each in output) if isinstance(output, tuple) else self.gain * output


def kind(name: str) -> str:
    """The name of a parameter or module without the number of its expert: experts are stacked."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part == "experts" and parts[i + 1 : i + 2] != ["experts"]), None)
    return name if at is None else ".".join([*parts[: at + 1], *parts[at + 2 :]])


def origins(case: Case) -> dict[str, set[str]]:
    """For each of our parameters upstream's that it holds, found by filling each of upstream's with its own number."""
    module = case.build()
    names = [name for name, _ in module.named_parameters()]
    for number, parameter in enumerate(module.parameters()):
        parameter.data.fill_(number)
    converted = from_upstream(module)
    found = {
        name: {names[int(number)] for number in parameter.unique()} for name, parameter in converted.named_parameters()
    }
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in module.parameters())
    assert {each for theirs in found.values() for each in theirs} == set(names)
    return found


def outputs(module: nn.Module, inputs: list[Tensor], rest: dict[str, Tensor]) -> Tensor:
    """All results of a call as one vector, for one seed."""
    torch.manual_seed(3)
    output = module(*inputs, **rest)
    return torch.cat([part.flatten() for part in (output if isinstance(output, tuple) else (output,))])


@every_case
def test_a_parameter_keeps_whether_it_is_trained(case: Case) -> None:
    held = origins(case)
    module = case.build()
    kinds = sorted({kind(name) for name, _ in module.named_parameters()})
    for frozen in (set(kinds), set(kinds[::2]), set(kinds[1::2]), set()):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(kind(name) not in frozen)
        for name, parameter in from_upstream(module).named_parameters():
            assert {parameter.requires_grad} == {kind(theirs) not in frozen for theirs in held[name]}, name


@every_case
def test_a_parameter_keeps_its_dtype_and_device(case: Case) -> None:
    held = origins(case)
    module = case.build()
    kinds = sorted({kind(name) for name, _ in module.named_parameters()})
    options = [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float16, "meta"), (torch.float32, "cpu")]
    chosen = {each: options[index % 4] for index, each in enumerate(kinds)}
    for name, parameter in list(module.named_parameters()):
        dtype, device = chosen[kind(name)]
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(parameter.detach().to(device, dtype)))
    for name, parameter in from_upstream(module).named_parameters():
        assert {(parameter.dtype, parameter.device.type)} == {chosen[kind(theirs)] for theirs in held[name]}, name


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_module_in_another_precision(case: Case, dtype: torch.dtype) -> None:
    """Casting and converting commute, to the bit."""
    first, then = from_upstream(case.build().to(dtype)).state_dict(), from_upstream(case.build()).to(dtype).state_dict()
    assert all(torch.equal(value, then[name]) and value.dtype == dtype for name, value in first.items())


@pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in CASES if "Slot" not in name[:5]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_low_precision_it_is_at_most_twice_as_wrong_as_upstream(case: Case, dtype: torch.dtype) -> None:
    """Slot attention aside, whose upstream draws other noise in each precision."""
    module = case.build().eval()
    rounded = [x.detach().to(dtype) for x in case.inputs()]
    oracle = outputs(copy.deepcopy(module).to(dtype).double(), [x.double() for x in rounded], case.rest())
    theirs = module.to(dtype)
    ours = from_upstream(Model(theirs)).inner
    ours_output = outputs(ours, rounded, case.rest())
    assert ours_output.dtype == dtype
    assert_within_budget(ours_output, outputs(theirs, rounded, case.rest()), oracle)


@every_case
def test_a_submodule_keeps_its_mode(case: Case) -> None:
    held = origins(case)
    module = case.build()
    owners = sorted({kind(name.rpartition(".")[0]) for name, _ in module.named_parameters()} - {""})
    for evaluated in (set(owners), set(owners[::2]), set()):
        for name, part in module.named_modules():
            part.train(True) if not name else None
        for name, part in module.named_modules():
            if kind(name) in evaluated and not any(part.children()):
                part.eval()
        converted = from_upstream(module)
        assert converted.training
        for name, part in converted.named_modules():
            theirs = {
                module.get_submodule(each.rpartition(".")[0]).training
                for own, _ in part.named_parameters(recurse=False)
                for each in held[f"{name}.{own}".strip(".")]
            }
            if len(theirs) == 1 and not hasattr(part, "dropout"):
                assert {part.training} == theirs, name
    assert not any(part.training for part in from_upstream(module.eval()).modules())


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["all trains", "only dropout trains"])
def test_dropout_keeps_its_rate_and_mode(case: Case, training: bool) -> None:
    module = case.build().train(training)
    dropouts = [part for part in module.modules() if isinstance(part, nn.Dropout)]
    for dropout in dropouts:
        dropout.train(not training)
    converted = from_upstream(module)
    assert converted.training == training
    for part in converted.modules():
        if isinstance(part, nn.Dropout) or getattr(part, "dropout", 0.0):
            assert part.training != training
            assert (part.p if isinstance(part, nn.Dropout) else part.dropout) in {each.p for each in dropouts}


@every_case
def test_nothing_is_shared_with_the_original(case: Case) -> None:
    module = Model(case.build())
    before = copy.deepcopy(module.state_dict())
    for converted in (from_upstream(module), from_upstream(module.inner)):
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@every_case
def test_a_module_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        module = case.make()
    converted, real = from_upstream(module), from_upstream(case.build())
    assert all(parameter.is_meta for parameter in converted.parameters())
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (converted, real)]
    assert shapes[0] == shapes[1]


@every_case
def test_conversion_draws_no_random_numbers(case: Case) -> None:
    module = case.build()
    state = torch.get_rng_state()
    from_upstream(module)
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_inside_a_model_outputs_and_gradients_are_upstreams(case: Case) -> None:
    """The model's own code calls it, with upstream's arguments, and reads upstream's results."""
    theirs = Model(case.build()).eval()
    ours = from_upstream(theirs)
    assert isinstance(ours, Model)
    assert isinstance(ours.inner, case.ours)
    assert not isinstance(theirs.inner, case.ours)
    results = []
    for model in (theirs, ours):
        inputs = case.inputs()
        output = outputs(model, inputs, case.rest())
        results.append((output, *gradients(output, *inputs, model.gain)))
    for our, their in zip(*results[::-1], strict=True):
        assert_close(our, their)


@every_case
def test_training_goes_on_from_where_upstream_was(case: Case) -> None:
    """With an optimizer of its own; what gradients upstream holds stays upstream's."""
    theirs = Model(case.build().eval())

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.zero_grad()
        output = outputs(model, case.inputs(), case.rest())
        output.square().mean().backward()
        optimizer.step()
        return output.detach()

    step(theirs)
    ours = from_upstream(theirs)
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert any(parameter.grad is not None for parameter in theirs.parameters())
    for _ in range(2):
        assert_close(step(ours), step(theirs))


@every_case
def test_a_converted_model_is_copied_saved_and_called_by_keyword(case: Case) -> None:
    model = Model(case.build()).eval()
    ours = from_upstream(model)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(outputs(again, case.inputs(), case.rest()), outputs(ours, case.inputs(), case.rest()))
    first = next(iter(inspect.signature(model.inner.forward).parameters))
    torch.manual_seed(3)
    by_keyword = ours.inner(**{first: case.inputs()[0]}, **({"media": case.inputs()[1]} if case.locations else {}))
    assert isinstance(by_keyword, tuple) == isinstance(model.inner(*case.inputs()), tuple)


@pytest.mark.compiled
@every_case
def test_inside_a_model_it_traces_in_one_graph(case: Case) -> None:
    model = from_upstream(Model(case.build().eval()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = case.inputs(), case.rest()
    assert_close(outputs(compiled, *given), outputs(model, *given))


@every_case
def test_shared_modules_stay_shared(case: Case) -> None:
    layer = case.build()
    model = nn.ModuleDict({"first": layer, "again": nn.Sequential(layer), "other": case.build()})
    converted = from_upstream(model)
    assert converted["first"] is converted["again"][0]
    assert converted["first"] is not converted["other"]
    assert len(list(converted.parameters())) == 2 * len(list(from_upstream(layer).parameters()))


@pytest.mark.parametrize(
    ("name", "part"),
    [("SlotAttention", "to_q"), ("MultiHeadSlotAttention", "mlp.0"), ("DynamicSlotsSoftMoE", "to_slot_embeds.0"),
     ("PerceiverResampler", "layers.1.0.to_kv"), ("GatedCrossAttentionBlock", "attn.to_out")],
)  # fmt: skip
def test_a_parameter_tied_to_the_model_around_stays_tied(name: str, part: str) -> None:
    model = Model(CASES[name].build())
    tied = model.inner.get_submodule(part)
    model.head = nn.Linear(tied.in_features, tied.out_features, bias=False)
    model.head.weight, model.alias = tied.weight, tied
    converted = from_upstream(model)
    inside = [module for module in converted.inner.modules() if module is converted.alias]
    assert len(inside) == 1
    assert converted.head.weight is inside[0].weight
    assert converted.head.weight is not tied.weight


def test_submodules_tied_inside_a_module_stay_tied() -> None:
    module = CASES["SlotAttention"].build()
    module.to_k = module.to_v
    module.norm_slots.weight = module.norm_input.weight
    converted = from_upstream(module)
    assert converted.to_k is converted.to_v
    assert converted.norm_slots.weight is converted.norm_tokens.weight
    assert len(list(converted.parameters())) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("name", "path"),
    [("SlotAttention", "slots_mu"), ("SepViT", "layers.0.2.layers.0.0.to_qkv.weight"),
     ("SoftMoE", "experts.experts.0.0.weight"), ("ATSViT", "to_patch_embedding.2.weight")],
)  # fmt: skip
def test_a_tied_parameter_that_lies_differently_in_narrows_is_refused(name: str, path: str) -> None:
    model = Model(CASES[name].build())
    model.tied = model.inner.get_parameter(path)
    with pytest.raises(InvalidArgument, match=f"module.inner.{path}: expected a parameter with one place.*Untie"):
        from_upstream(model)


def test_experts_that_are_one_module_are_refused() -> None:
    module = CASES["SoftMoE"].build()
    module.experts.experts[1] = module.experts.experts[0]
    with pytest.raises(InvalidArgument, match=r"module.experts.experts.0.0.weight: .* tied to others"):
        from_upstream(module)


@pytest.mark.parametrize("change", ["frozen", "dtype"])
def test_experts_that_differ_cannot_be_stacked(change: str) -> None:
    module = CASES["SoftMoE"].build()
    expert = module.experts.experts[1]
    expert.requires_grad_(False) if change == "frozen" else expert.double()
    with pytest.raises(
        InvalidArgument, match=r"module.experts.experts.0.0.weight: expected a parameter like the 2 others"
    ):
        from_upstream(module)


def _other_eps(module: nn.Module) -> None:
    """Large enough that a norm that forgot it is seen."""
    for index, part in enumerate(part for part in module.modules() if isinstance(part, nn.LayerNorm)):
        part.eps = 0.1 + 0.05 * index
    for part in module.modules():
        if type(part).__name__ == "ChanLayerNorm":
            part.eps = 0.2


def _without_biases(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm | nn.Conv2d):
            part.bias = None


def _with_biases(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d) and part.bias is None:
            part.bias = nn.Parameter(torch.randn(len(part.weight)))


def _without_gains(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight = part.bias = None


def _without_recurrent_biases(module: nn.Module) -> None:
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.GRUCell):
            module.set_submodule(name, nn.GRUCell(part.input_size, part.hidden_size, bias=False))


SETTINGS = {
    "eps": _other_eps,
    "no biases": _without_biases,
    "more biases": _with_biases,
    "norms without weights": _without_gains,
    "recurrence without biases": _without_recurrent_biases,
}


# Stacked experts always have biases, SepViT's queries, keys and values never.
REFUSED = [("no biases", "SoftMoE"), ("no biases", "SoftMoE gated"), ("no biases", "DynamicSlotsSoftMoE"),
           ("more biases", "SepViT")]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_parts_carry_over(setting: str, name: str) -> None:
    """Or are refused: never is another function computed."""
    module, given = CASES[name].build().eval(), (CASES[name].inputs(), CASES[name].rest())
    SETTINGS[setting](module)
    if (setting, name) in REFUSED:
        with pytest.raises(InvalidArgument, match=r"^module\.inner\.[\w.]+\.bias: expected "):
            from_upstream(Model(module))
    else:
        assert_close(outputs(from_upstream(Model(module)).inner, *given), outputs(module, *given))


def _hook(*args: object) -> None:
    return None


def _lora(linear: nn.Linear) -> nn.Module:
    return lora.Linear(linear, "default", peft.LoraConfig(r=2), r=2)


class Scaled(nn.Linear):
    """A subclass of a class of torch."""


def _subclass(linear: nn.Linear) -> nn.Module:
    return Scaled(linear.in_features, linear.out_features)


def _replaced(linear: nn.Linear) -> None:
    linear.forward = linear.forward


CHANGES: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "forward hook": (lambda part: part.register_forward_hook(_hook), "forward hooks"),
    "forward pre-hook": (lambda part: part.register_forward_pre_hook(_hook), "forward pre hooks"),
    "backward hook": (lambda part: part.register_full_backward_hook(_hook), "backward hooks"),
    "state-dict hook": (lambda part: part.register_state_dict_post_hook(_hook), "state dict hooks"),
    "hook on a parameter": (lambda part: part.weight.register_hook(_hook) and None, "hooks on weight"),
    "hook on its gradient": (
        lambda part: part.weight.register_post_accumulate_grad_hook(_hook) and None,
        "hooks on weight",
    ),
    "int8 weights": (
        lambda part: quantize_(part, Int8WeightOnlyConfig()),
        r"weight of class \w*Int8\w*|weight of class \w+Tensor",
    ),
    "spectral_norm": (parametrizations.spectral_norm, "Parametrized"),
    "weight_norm": (weight_norm, "forward pre hooks"),
    "pruning": (lambda part: prune.l1_unstructured(part, "weight", 0.5), "forward pre hooks"),
    "replaced forward": (_replaced, "a forward that was replaced"),
    "LoRA": (_lora, "a peft"),
    "subclass": (_subclass, "Scaled"),
}


@pytest.mark.parametrize(("change", "got"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    ("name", "path", "nested"),
    [("SlotAttention", "to_q", True), ("SoftMoE", "experts.experts.1.3", False), ("SepViT", "mlp_head.2", False)],
)
def test_what_was_put_on_a_part_is_never_lost(
    name: str, path: str, nested: bool, change: Callable[[nn.Linear], object], got: str
) -> None:
    module = CASES[name].build()
    changed = change(module.get_submodule(path))
    if isinstance(changed, nn.Module):
        module.set_submodule(path, changed)
    where = f"module.{'inner.' * nested}{path}"
    with pytest.raises(InvalidArgument, match=rf"{where}(\.\w+)*: expected the part as upstream .*{got}.*Merge LoRA"):
        from_upstream(Model(module) if nested else module)


@every_case
def test_a_hook_on_any_part_is_refused_and_named(case: Case) -> None:
    module = case.build()
    for name, part in module.named_modules():
        handle = part.register_forward_hook(_hook)
        with pytest.raises(InvalidArgument, match=f"^{'.'.join(filter(None, ('module', name)))}: .*forward hooks"):
            from_upstream(module)
        handle.remove()
    from_upstream(module)


def test_hooks_on_the_model_around_are_kept() -> None:
    model = Model(CASES["SlotAttention"].build())
    calls = []
    model.before.register_forward_hook(lambda *args: calls.append(args))
    from_upstream(model)(torch.randn(2, 7, 12))
    assert len(calls) == 1


@every_case
def test_a_part_or_parameter_that_upstream_does_not_have_is_named(case: Case) -> None:
    module = case.build()
    module.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidArgument, match=r"module\.extra: expected no parameter"):
        from_upstream(module)
    module = case.build()
    module.extra = nn.Tanh()
    with pytest.raises(InvalidArgument, match=r"module.extra: expected nothing.* got Tanh\(\)"):
        from_upstream(module)


@every_case
def test_an_activation_that_was_exchanged_is_copied_or_refused(case: Case) -> None:
    """Never computed as if it were upstream's."""
    names = [name for name, part in case.build().named_modules() if isinstance(part, nn.GELU | nn.ReLU | nn.Softmax)]
    for name in names:
        for other in (nn.SiLU(), nn.GELU(approximate="tanh")):
            module = case.build().eval()
            module.set_submodule(name, other)
            with contextlib.suppress(InvalidArgument):
                converted = from_upstream(Model(module)).inner
                given = case.inputs(), case.rest()
                assert_close(outputs(converted, *given), outputs(module, *given))


@every_case
def test_a_linear_map_of_another_shape_is_named(case: Case) -> None:
    for name, part in case.build().named_modules():
        if isinstance(part, nn.Linear):
            module = case.build()
            module.set_submodule(
                name, nn.Linear(part.in_features + 3, part.out_features + 3, bias=part.bias is not None)
            )
            with pytest.raises(InvalidArgument, match=r"module\.[\w.]+: expected .*shape|like the"):
                from_upstream(module)


@every_case
def test_subclasses_are_refused_by_name(case: Case) -> None:
    module = case.build()
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"__module__": "my.code"})
    with pytest.raises(
        InvalidType, match=rf"^module: expected a {kind.__name__} of .* got a my\.code\.Mine, a subclass"
    ):
        from_upstream(module)
    with pytest.raises(InvalidType, match=r"^module\.inner: .*my\.code\.Mine, a subclass"):
        from_upstream(Model(module))


def test_a_module_without_anything_of_upstream_is_named() -> None:
    with pytest.raises(InvalidType, match=r"^module: .*got a torch.nn.modules.linear.Linear, without any inside"):
        from_upstream(nn.Linear(2, 2))
    with pytest.raises(InvalidType, match=r"got a narrows.layers.slot_attention.SlotAttention, without"):
        from_upstream(from_upstream(CASES["SlotAttention"].build()))
    with pytest.raises(TypeError, match="module"):  # under the shape checks they are the first to say so
        from_upstream({})


def test_a_part_that_was_replaced_by_another_kind_is_named() -> None:
    module = CASES["SlotAttention"].build()
    module.norm_input = nn.Identity()
    with pytest.raises(InvalidArgument, match=r"module.norm_input: expected an nn.LayerNorm, got a .*Identity"):
        from_upstream(module)
    module = CASES["SlotAttention"].build()
    del module.mlp
    with pytest.raises(InvalidArgument, match=r"module: expected the parts that a slot_attention.* 'mlp'"):
        from_upstream(module)


def test_changed_attributes_that_narrows_computes_itself_are_named() -> None:
    module = CASES["SlotAttention"].build()
    module.scale = 1.0
    with pytest.raises(InvalidArgument, match=r"module.scale: expected upstream's own 0.28.*got 1.0"):
        from_upstream(module)
