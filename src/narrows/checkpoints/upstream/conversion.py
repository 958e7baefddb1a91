"""How the parts of a module of another package become the parts of a narrows module."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from narrows.errors import InvalidArgument

HINT = (
    "Merge LoRA, remove hooks and parametrizations, convert before quantising or sharding; then add them to the result."
)
REPLACED = "Was it replaced? Convert with upstream's own part, then replace the part of the result."


class Rearranged(NamedTuple):
    """A parameter whose numbers lie differently in narrows, or that is stacked from several.

    Args:
        names: upstream's parameters.
        layout: makes of them, in this order, the one of narrows.
        trained: whether it takes upstream's `requires_grad`; False for what upstream has as a constant.
    """

    names: tuple[str, ...]
    layout: Callable[..., Tensor]
    trained: bool = True


class Conversion(NamedTuple):
    """A narrows module, and for each of its parts the part of the upstream module that it replaces.

    Args:
        ours: the narrows module, of upstream's sizes; its own parameters are thrown away.
        as_upstream: a subclass of its class, called with upstream's arguments and answering as upstream does, for a
            model whose code calls it.
        modules: names of submodules of ours, to names of upstream's. Two of the same class of torch: upstream's is
            copied as it is, with eps, share of dropout, missing biases. Otherwise the mode is taken, and a norm's eps.
        parameters: names of the other parameters of ours, to where they come from: upstream's name, or `Rearranged`.
        without_module: names of upstream's submodules that are no submodules in ours (activations that are called as
            functions, experts that are stacked), to the class they must be of.
        dropouts: names of submodules of ours that have a number `dropout`, to names of upstream's `nn.Dropout`s.
        settings: names of attributes of upstream's, to the one value of theirs that ours computes with.
    """

    ours: nn.Module
    as_upstream: type[nn.Module]
    modules: Mapping[str, str]
    parameters: Mapping[str, str | Rearranged]
    without_module: Mapping[str, type[nn.Module]] = MappingProxyType({})
    dropouts: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    settings: Mapping[str, float] = MappingProxyType({})


def class_name(module: nn.Module) -> str:
    """`package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_unchanged(theirs: nn.Module, path: str) -> None:
    """Raise if anything was put on or in an upstream module that a conversion would lose.

    Raises:
        InvalidArgument: a submodule of a class that neither torch nor the package has (LoRA, quantised, parametrized, a
            subclass), a hook, a replaced `forward`, a parameter of another tensor class.
    """
    package = type(theirs).__module__.partition(".")[0]
    for name, part in theirs.named_modules():
        got = None
        hooks = [key for key, value in vars(part).items() if key.endswith("_hooks") and value]
        if not class_name(part).startswith((f"{package}.", "torch.nn.modules.", "einops.")):
            got = f"a {class_name(part)}"
        elif hooks:
            got = f"hooks ({', '.join(hooks).replace('_', ' ').strip()})"
        elif "forward" in vars(part):
            got = "a forward that was replaced"
        else:
            for parameter_name, parameter in part.named_parameters(recurse=False):
                if type(parameter) is not nn.Parameter:
                    got = f"{parameter_name} of class {type(parameter).__name__}"
                elif parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                    got = f"hooks on {parameter_name}"
        if got is not None:
            raise InvalidArgument(joined(path, name), expected="the part as upstream makes it", got=got, hint=HINT)


def carry_over(
    theirs: nn.Module, conversion: Conversion, *, path: str, memo: dict[int, Any], uses: Counter[int]
) -> nn.Module:
    """The narrows module with the parameters, settings and modes of the upstream module.

    Args:
        theirs: the upstream module.
        conversion: what becomes what.
        path: its name in the model, for messages.
        memo: as `copy.deepcopy` keeps it: what was copied before is not copied again, so that shared parts stay shared.
        uses: by how many names each parameter of the model is reached.

    Raises:
        InvalidArgument: a part of another class or shape than upstream makes it, or that upstream does not have.
    """
    unfilled = set(conversion.ours.parameters())
    taken = _fill_modules(theirs, conversion, path, memo)
    for name, source in conversion.parameters.items():
        owner, leaf = conversion.ours.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value, names = _value(theirs, source, path, memo, uses)
        if value is None and not _is_plain(owner):
            raise InvalidArgument(
                joined(path, names[0]), expected="a parameter, as upstream has there", got="none", hint=REPLACED
            )
        _check_shape(joined(path, names[0]), value, getattr(owner, leaf))
        setattr(owner, leaf, value)
        taken |= set(names)
    _set_dropouts(theirs, conversion, path)
    for name, expected in conversion.settings.items():
        if (got := attrgetter(name)(theirs)) != expected:
            raise InvalidArgument(
                joined(path, name),
                expected=f"upstream's own {expected}",
                got=got,
                hint="Set it back: narrows computes with that.",
            )
    _check_nothing_left(theirs, conversion, taken, path)
    assert unfilled.isdisjoint(conversion.ours.parameters()), "a parameter of ours was not filled"
    return conversion.ours


def _fill_modules(theirs: nn.Module, conversion: Conversion, path: str, memo: dict[int, Any]) -> set[str]:
    """Give every submodule of ours its mode, copy those of the same class, and return the parameters copied."""
    taken: set[str] = set()
    for name, own in list(conversion.ours.named_modules()):
        if name not in conversion.modules:
            own.training = conversion.ours.get_submodule(name.rpartition(".")[0]).training
            continue
        their_name = conversion.modules[name]
        their, leaves = _part(theirs, their_name, path), dict(own.named_parameters(recurse=False))
        own.training = their.training
        if not _is_plain(own):
            continue
        if type(own) is type(their):
            for leaf, parameter in their.named_parameters(remove_duplicate=False):
                _check_shape(joined(path, their_name, leaf), parameter, leaves.get(leaf))
                taken.add(joined(their_name, leaf))
            conversion.ours.set_submodule(name, copy.deepcopy(their, memo))
        elif not leaves or any(joined(name, leaf) not in conversion.parameters for leaf in leaves):
            raise InvalidArgument(
                joined(path, their_name),
                expected=f"an nn.{type(own).__name__}",
                got=f"a {class_name(their)}",
                hint=REPLACED,
            )
        elif isinstance(own, nn.LayerNorm):
            own.eps = getattr(their, "eps", own.eps)
    return taken


def _value(
    theirs: nn.Module, source: str | Rearranged, path: str, memo: dict[int, Any], uses: Counter[int]
) -> tuple[nn.Parameter | None, tuple[str, ...]]:
    """A parameter of ours, None where upstream's is, and the names of what it was made of."""
    names = (source,) if isinstance(source, str) else source.names
    tensors = [getattr(_part(theirs, name.rpartition(".")[0], path), name.rpartition(".")[2]) for name in names]
    if isinstance(source, str) or tensors.count(None) == len(tensors):
        return copy.deepcopy(tensors[0], memo), names
    first, kinds = tensors[0], {_kind(tensor) for tensor in tensors}
    if len(kinds) > 1:
        raise InvalidArgument(
            joined(path, names[0]),
            expected=f"a parameter like the {len(tensors) - 1} others that are stacked with it in narrows",
            got=f"differences: {', '.join(sorted(kinds))}",
            hint="Freeze, move or cast all of them, or none.",
        )
    if source.trained and any(uses[id(tensor)] > 1 for tensor in tensors):
        raise InvalidArgument(
            joined(path, names[0]),
            expected="a parameter with one place: in narrows its numbers lie differently",
            got="one that is tied to others",
            hint="Untie them, with a copy of the parameter, before the conversion.",
        )
    value = source.layout(*(tensor.detach() for tensor in tensors)).clone()
    return nn.Parameter(value, requires_grad=first.requires_grad and source.trained), names


def _set_dropouts(theirs: nn.Module, conversion: Conversion, path: str) -> None:
    for name, their_names in conversion.dropouts.items():
        own, first = conversion.ours.get_submodule(name), _part(theirs, their_names[0], path)
        for each in their_names:
            dropout = _part(theirs, each, path)
            if repr(dropout) != repr(first) or (first.p > 0 and dropout.training != first.training):
                raise InvalidArgument(
                    joined(path, each),
                    expected=f"{first} with training={first.training}, as {their_names[0]}, which in narrows is one",
                    got=f"{dropout} with training={dropout.training}",
                    hint="Give them one rate and one mode.",
                )
        own.dropout = first.p
        if first.p > 0:
            own.training = first.training


def _kind(tensor: nn.Parameter | None) -> str:
    if tensor is None:
        return "none"
    return f"shape {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with requires_grad={tensor.requires_grad}"


def _check_shape(path: str, theirs: Tensor | None, ours: Tensor | None) -> None:
    if theirs is not None and ours is not None and theirs.shape != ours.shape:
        expected, got = (f"shape {tuple(tensor.shape)}" for tensor in (ours, theirs))
        raise InvalidArgument(path, expected=f"{expected}, which the other parts need", got=got, hint=REPLACED)


def joined(*names: str) -> str:
    """Names of nested modules with dots between them."""
    return ".".join(filter(None, names))


def alias(name: str) -> Any:
    """An attribute by its name in narrows, to be read and set by the name that upstream has for it."""
    *owners, leaf = name.split(".")

    def owner(module: Any) -> Any:
        for each in owners:
            module = getattr(module, each)
        return module

    return property(
        lambda module: getattr(owner(module), leaf), lambda module, value: setattr(owner(module), leaf, value)
    )


def _is_plain(module: nn.Module) -> bool:
    """A module of torch without submodules: a container is not copied but filled."""
    return type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())


def _part(theirs: nn.Module, name: str, path: str) -> Any:
    try:
        return theirs.get_submodule(name)
    except AttributeError:
        raise InvalidArgument(
            joined(path, name), expected="a submodule, as upstream has there", got="none", hint=REPLACED
        ) from None


def _check_nothing_left(theirs: nn.Module, conversion: Conversion, taken: set[str], path: str) -> None:
    known = {*conversion.modules.values(), *(each for names in conversion.dropouts.values() for each in names)}
    for name, part in theirs.named_modules():
        expected = conversion.without_module.get(name)
        changed = type(part) is not expected or getattr(part, "approximate", "none") != "none"
        if (name not in known or expected is not None) and _is_plain(part) and changed:
            wanted = "nothing, as upstream has there" if expected is None else f"an nn.{expected.__name__}()"
            raise InvalidArgument(joined(path, name), expected=wanted, got=repr(part), hint=REPLACED)
    for name, _ in theirs.named_parameters(remove_duplicate=False):
        if name not in taken:
            raise InvalidArgument(
                joined(path, name),
                expected="no parameter, as upstream has none there",
                got="one",
                hint="Take it off, convert, and add it to the result.",
            )
