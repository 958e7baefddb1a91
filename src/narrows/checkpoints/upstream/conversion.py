"""Carrying the parts of an upstream module over into a narrows module."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from narrows.errors import InvalidArgument

HINT = "Merge LoRA, remove hooks and parametrizations, dequantise; convert; then put them on the result."


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
        without_module: names of upstream's submodules for which ours has code and no submodule, to the class they must
            be of.
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
                elif parameter._backward_hooks:
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
    ours = conversion.ours
    taken: set[str] = set()
    for name, expected in conversion.settings.items():
        if (got := attrgetter(name)(theirs)) != expected:
            raise InvalidArgument(joined(path, name), expected=f"{expected}, as upstream has it", got=got)
    for name, own in list(ours.named_modules()):
        if name not in conversion.modules:
            own.training = ours.get_submodule(name.rpartition(".")[0]).training
            continue
        their_name = conversion.modules[name]
        their = _part(theirs, their_name, path)
        own.training = their.training
        if not _is_plain(own):
            continue
        if type(own) is type(their):
            _check_shapes(own, their, joined(path, their_name))
            ours.set_submodule(name, copy.deepcopy(their, memo))
            taken |= {joined(their_name, parameter) for parameter, _ in their.named_parameters()}
        elif any(joined(name, parameter) not in conversion.parameters for parameter, _ in own.named_parameters()):
            raise InvalidArgument(
                joined(path, their_name), expected=f"an nn.{type(own).__name__}", got=f"a {class_name(their)}"
            )
        elif hasattr(own, "eps"):
            own.eps = their.eps  # pyright: ignore[reportAttributeAccessIssue]

    for name, source in conversion.parameters.items():
        owner, leaf = ours.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        names = (source,) if isinstance(source, str) else source.names
        tensors = [_parameter(theirs, each, path) for each in names]
        taken |= set(names)
        if isinstance(source, str):
            value = copy.deepcopy(tensors[0], memo)
        else:
            value = _rearranged(source, tensors, joined(path, names[0]), uses)
        expected = getattr(owner, leaf)
        if value is not None and value.shape != expected.shape:
            raise InvalidArgument(
                joined(path, names[0]), expected=f"shape {tuple(expected.shape)} in narrows", got=tuple(value.shape)
            )
        setattr(owner, leaf, value)

    for name, their_names in conversion.dropouts.items():
        own, first = ours.get_submodule(name), _part(theirs, their_names[0], path)
        for each in their_names:
            dropout = _part(theirs, each, path)
            if type(dropout) is not nn.Dropout or (dropout.p, dropout.training) != (first.p, first.training):
                raise InvalidArgument(
                    joined(path, each),
                    expected=f"{first} {_mode(first)}, as {their_names[0]}: narrows has one rate and mode for both",
                    got=f"{dropout} {_mode(dropout)}",
                )
        own.dropout, own.training = first.p, first.training
    _check_nothing_left(theirs, conversion, taken, path)
    return ours


def joined(*names: str) -> str:
    """Names of nested modules with dots between them."""
    return ".".join(filter(None, names))


def alias(name: str) -> Any:
    """An attribute by its name in narrows, to be read and set by the name that upstream has for it."""
    owner, _, leaf = name.rpartition(".")
    of = attrgetter(owner) if owner else lambda module: module
    return property(lambda module: getattr(of(module), leaf), lambda module, value: setattr(of(module), leaf, value))


def _is_plain(module: nn.Module) -> bool:
    """A module of torch without submodules: a container is not copied but filled."""
    return type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())


def _part(theirs: nn.Module, name: str, path: str) -> Any:
    try:
        return theirs.get_submodule(name)
    except AttributeError:
        raise InvalidArgument(joined(path, name), expected="a submodule, as upstream has there", got="none") from None


def _parameter(theirs: nn.Module, name: str, path: str) -> nn.Parameter | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(_part(theirs, owner, path), leaf)


def _check_shapes(own: nn.Module, their: nn.Module, path: str) -> None:
    shapes = {name: parameter.shape for name, parameter in own.named_parameters()}
    for name, parameter in their.named_parameters():
        if name in shapes and parameter.shape != shapes[name]:
            raise InvalidArgument(
                joined(path, name), expected=f"shape {tuple(shapes[name])}", got=tuple(parameter.shape)
            )


def _rearranged(
    source: Rearranged, tensors: list[nn.Parameter | None], path: str, uses: Counter[int]
) -> nn.Parameter | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    first = given[0]
    kinds = {(tensor.dtype, tensor.device, tensor.requires_grad) for tensor in given}
    if len(given) < len(tensors) or len(kinds) > 1:
        raise InvalidArgument(
            path,
            expected=f"the same as the {len(tensors) - 1} others that become one parameter in narrows",
            got=f"several of dtype, device, requires_grad: {sorted(map(str, kinds))}",
            hint="Freeze, move or cast all of them, or none.",
        )
    if source.trained and any(uses[id(tensor)] > 1 for tensor in given):
        raise InvalidArgument(
            path,
            expected="a parameter with one place: in narrows its numbers lie differently",
            got="one that is tied to others",
            hint="Untie them, with a copy of the parameter, before the conversion.",
        )
    value = source.layout(*(tensor.detach() for tensor in given)).clone()
    return nn.Parameter(value, requires_grad=first.requires_grad and source.trained)


def _mode(module: nn.Module) -> str:
    return "in training" if module.training else "in evaluation"


def _check_nothing_left(theirs: nn.Module, conversion: Conversion, taken: set[str], path: str) -> None:
    for name, part in theirs.named_modules():
        expected = conversion.without_module.get(name)
        dropouts = {each for names in conversion.dropouts.values() for each in names}
        known = name in dropouts or name in conversion.modules.values()
        changed = getattr(part, "approximate", "none") != "none"
        if _is_plain(part) and not known and (type(part) is not expected or changed):
            wanted = "nothing, as upstream has there" if expected is None else f"an nn.{expected.__name__}()"
            if not any(joined(name, parameter) in taken for parameter, _ in part.named_parameters()):
                raise InvalidArgument(joined(path, name), expected=wanted, got=repr(part))
    left = [name for name, _ in theirs.named_parameters(remove_duplicate=False) if name not in taken]
    if left:
        raise InvalidArgument(joined(path, left[0]), expected="no parameter: upstream has none there", got="one")
