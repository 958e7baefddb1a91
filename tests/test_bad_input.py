"""A thousand bad arguments over the public face: each is a clear error, none is accepted, none fails later and raw.

Bad values follow from the annotation of a parameter, further ones from the tables below. A call is well formed but for
the one argument. An error is clear if narrows raises it on purpose.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import NarrowsError

# Shape checks of the test run would answer first.
pytestmark = pytest.mark.compiled

BAD_OF_KIND: dict[type, tuple[Any, ...]] = {
    bool: ("no", "True", 2, 0.0, [], object()),
    int: ("3", 2.5, math.nan, [4], object(), 1j),
    float: ("0.5", [0.5], math.nan, math.inf, -math.inf, object(), 1j),
    str: (3, b"auto", ["auto"], object(), 1.5),
    Tensor: ("tokens", 3, [[1.0]], np.zeros((2, 6, 8), np.float32), object()),
    torch.dtype: ("float33", 3, "bfloat16", object()),
    torch.device: (1.5, object(), [0]),
    torch.Generator: (0, "seed", object()),
    nn.Module: (3, "slots", object(), nn.Linear),
}


def _tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@cache
def _language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@cache
def _flamingo() -> nn.Module:
    model = narrows.Flamingo(copy.deepcopy(_language_model()), media_dim=8, every=1, media_token_id=1)
    return model.eval()


MODELS = (_language_model, _flamingo)


def _vit() -> nn.Module:
    return narrows.create_model("vit_mini", channels=1)


# By class: arguments of a well-formed call, and values of the right kind that are out of range.
CONSTRUCTORS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "ObjectDiscovery": (
        {
            "encoder": {"kind": "features", "feature_dim": 8},
            "decoder": {"kind": "mlp", "feature_dim": 8, "grid": [2, 2], "hidden_dims": [8]},
            "num_slots": 3,
            "slot_dim": 8,
        },
        {
            **dict.fromkeys(("num_slots", "slot_dim", "num_iterations", "later_iterations"), (0, -1)),
            "mlp_dim": (-1,),
            "predictor_window": (0, 1, -1),
            "predictor_heads": (0, 3),
            **dict.fromkeys(("encoder", "decoder"), ({}, {"kind": "fast"}, {"kind": "mlp"})),
            **dict.fromkeys(("initial_slots", "gradient"), ("fast", "")),
        },
    ),
    "SlotAttention": (
        {"dim": 8, "num_slots": 3},
        {
            **dict.fromkeys(("dim", "num_slots", "slot_dim", "heads", "head_dim"), (0, -1)),
            "mlp_dim": (-1,),
            "num_iterations": (0, -1),
            "eps": (-1e-8,),
            "impl": ("fast", ""),
        },
    ),
    "TwoWaySlotAttention": (
        {"dim": 8, "num_slots": 3},
        {
            **dict.fromkeys(("dim", "num_slots", "slot_dim", "mlp_dim", "num_iterations"), (0, -1)),
            "eps": (-1e-8,),
            "token_normalization": ("tokens?", ""),
            "impl": ("fast", ""),
        },
    ),
    "SoftMoE": (
        {"dim": 8, "num_experts": 2},
        {
            **dict.fromkeys(("dim", "num_experts", "slots_per_expert"), (0, -1)),
            "expert_mult": (0.0, -4.0),
            "dropout": (-0.1, 1.5),
            **dict.fromkeys(("experts", "normalization", "impl"), ("fast", "")),
        },
    ),
    "DynamicSlotsSoftMoE": (
        {"dim": 8, "num_experts": 2},
        {
            **dict.fromkeys(("dim", "num_experts", "slots_per_expert"), (0, -1)),
            "capacity_factor": (0.0, -1.0),
            "expert_mult": (0.0, -4.0),
            "dropout": (-0.1, 1.5),
            **dict.fromkeys(("experts", "normalization", "impl"), ("fast", "")),
        },
    ),
    "SeparableAttention": (
        {"dim": 8, "heads": 2, "window_size": 2},
        {
            **dict.fromkeys(("dim", "window_size"), (0, -1)),
            "heads": (0, -1, 3),
            "window_grid": ((0, 1), (1, -1), (1,), (1, 1, 1), 3, "11"),
            "impl": ("fast", ""),
        },
    ),
    "PerceiverResampler": (
        {"dim": 8, "depth": 1, "heads": 2, "head_dim": 4},
        {
            **dict.fromkeys(("dim", "depth", "num_latents", "heads", "head_dim", "num_time_embeddings"), (0, -1)),
            "mlp_ratio": (0, -4.0),
            **dict.fromkeys(("activation", "time_axis", "impl"), ("fast", "")),
        },
    ),
    "MaskedCrossAttention": (
        {"dim": 8, "heads": 2, "head_dim": 4},
        {**dict.fromkeys(("dim", "media_dim", "heads", "head_dim"), (0, -1)), "impl": ("fast", "")},
    ),
    "GatedCrossAttentionBlock": (
        {"dim": 8, "heads": 2, "head_dim": 4},
        {
            **dict.fromkeys(("dim", "media_dim", "heads", "head_dim"), (0, -1)),
            "mlp_ratio": (0, -4.0),
            **dict.fromkeys(("activation", "impl"), ("fast", "")),
        },
    ),
    "AdaptiveTokenSampler": (
        {"num_tokens": 3},
        {"num_tokens": (0, -1), **dict.fromkeys(("sampling", "impl"), ("fast", ""))},
    ),
    "ATSViT": (
        {
            "depth": 1,
            "keep": (0.5,),
            "image_size": 8,
            "patch_size": 4,
            "num_classes": 3,
            "dim": 8,
            "heads": 2,
            "mlp_dim": 8,
        },
        {
            **dict.fromkeys(("depth", "image_size", "patch_size", "channels", "dim", "heads", "mlp_dim"), (0, -1)),
            "head_dim": (0, -1),
            "num_classes": (-1,),
            "keep": (0.0, 17, (0.5, 0.5), (), (0.0,), (-1,), (1.5,), (math.nan,), ("half",), "half"),
            "dropout": (-0.1, 1.5),
            **dict.fromkeys(("sampling", "stem"), ("fast", "")),
        },
    ),
    "SepViT": (
        {"image_size": 16, "num_classes": 3, "dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "window_size": 2},
        {
            **dict.fromkeys(("channels", "patch_stride"), (0, -1)),
            "image_size": (0, -1, (16,), (0, 16), "16"),
            "num_classes": (-1,),
            "dims": (8, (), (8,), (8, 0), (8, -1), "88", (8, "16")),
            "depths": (1, (), (1,), (1, 0), (1, -1), (1, 1.5)),
            "heads": (0, -1, (1,), (1, 3), (1, "2"), "12"),
            "window_size": (0, -1, (2,), (2, 0), "22"),
            "mlp_ratio": (0.0, -1.0, (4.0,), (4.0, -1.0), (math.nan, 4.0), "44"),
            **dict.fromkeys(("drop_path_rate", "drop_rate"), (-0.1, 1.5)),
            **dict.fromkeys(("window_tokens", "global_pool"), ("fast",)),
        },
    ),
    "LastMedia": ({"count": 2}, {"count": (0, -1)}),
    "TargetMACs": ({"goal": 0.5}, {"goal": (0, -1, math.nan, math.inf), "images": (_tokens(3), _tokens(0, 1, 32, 32))}),
    "TargetLatency": ({"goal": 0.5}, {"goal": (0, -1, math.nan, math.inf), "images": (_tokens(3),)}),
    "Routing": (
        {"weights": _tokens(1, 1, 2, 4).softmax(-1), "carriers": "slots", "grid": (2, 2)},
        {
            "weights": (_tokens(2, 4), _tokens(1, 1, 2, 4).long()),
            "grid": ((2,), (3, 3), (0, 4), (-2, -2), 4, "22", (2.0, 2.0)),
            "prefix": (-1, 5),
        },
    ),
    "Flamingo": (
        {"language_model": _language_model, "media_dim": 8, "every": 1},
        {
            "language_model": (nn.Linear(2, 2),),
            "media_dim": (0, -1),
            "every": (0, -1, (7,), (-1,), (), "1", (0.5,)),
            "placement": ("beside", ""),
            "media_token_id": (-1,),
            "resampler": ("deep", 3, {"depht": 1}, {"depth": 0}),
            "block": ("wide", 3, {"head": 1}, {"heads": 0}),
        },
    ),
}


def _layer(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(narrows, name)(**CONSTRUCTORS[name][0])


MASKS = (torch.ones(2, 6), torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool), torch.ones(6) > 0)
TOKENS = (_tokens(2, 6, 7), _tokens(2, 8), _tokens(8), _tokens(2, 6, 8).long(), _tokens(2, 6, 8) > 0)
SLOTS = (_tokens(2, 3, 7), _tokens(3, 3, 8), _tokens(3, 8), _tokens(2, 3, 8).long())
SLOT_CALL = {
    "tokens": TOKENS,
    "mask": MASKS,
    "slots": SLOTS,
    "num_slots": (0, -1),
    "num_iterations": (0, -1),
    "slot_mask": (torch.ones(2, 3), torch.ones(2, 4) > 0, torch.ones(3) > 0),
    "temperature": (0.0, -1.0),
}
MEDIA_CALL = {
    "text": (_tokens(2, 6, 7), _tokens(2, 8), _tokens(2, 6, 8).long()),
    "media": (_tokens(2, 2, 3, 7), _tokens(2, 3, 8), _tokens(3, 2, 3, 8), _tokens(2, 2, 3, 8).long()),
    "media_locations": (torch.ones(2, 6), torch.ones(2, 5) > 0, torch.ones(6) > 0),
    "media_mask": (torch.ones(2, 2), torch.ones(2, 3) > 0, torch.ones(2, 2, 4) > 0, torch.ones(2) > 0),
}
MEDIA = {
    "text": _tokens(2, 6, 8),
    "media": _tokens(2, 2, 3, 8),
    "media_locations": torch.tensor([[1, 0, 1, 0, 0, 0]] * 2) > 0,
}
IMAGES = (_tokens(2, 3, 8), _tokens(3, 8, 8), _tokens(2, 1, 8, 8), _tokens(2, 3, 8, 8).long())

# By name: what is called, arguments of a well-formed call, and values of the right kind that are out of range.
CALLS: dict[str, tuple[Callable[[], Callable[..., Any]], dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "SlotAttention()": (_layer("SlotAttention"), {"tokens": _tokens(2, 6, 8)}, SLOT_CALL),
    "TwoWaySlotAttention()": (_layer("TwoWaySlotAttention"), {"tokens": _tokens(2, 6, 8)}, SLOT_CALL),
    "SoftMoE()": (_layer("SoftMoE"), {"tokens": _tokens(2, 6, 8)}, {"tokens": TOKENS, "mask": MASKS}),
    "DynamicSlotsSoftMoE()": (
        _layer("DynamicSlotsSoftMoE"),
        {"tokens": _tokens(2, 6, 8)},
        {"tokens": TOKENS, "mask": MASKS},
    ),
    "SeparableAttention()": (
        _layer("SeparableAttention"),
        {"feature_map": _tokens(2, 4, 4, 8)},
        {
            "feature_map": (_tokens(2, 4, 4, 7), _tokens(2, 4, 8), _tokens(2, 4, 4, 8).long()),
            "mask": (torch.ones(2, 4, 4), torch.ones(2, 4, 3) > 0, torch.ones(2, 16) > 0),
        },
    ),
    "PerceiverResampler()": (
        _layer("PerceiverResampler"),
        {"media": _tokens(2, 6, 8)},
        {"media": (_tokens(2, 6, 7), _tokens(8), _tokens(2, 6, 8).long()), "mask": MASKS},
    ),
    "MaskedCrossAttention()": (_layer("MaskedCrossAttention"), MEDIA, MEDIA_CALL),
    "GatedCrossAttentionBlock()": (_layer("GatedCrossAttentionBlock"), MEDIA, MEDIA_CALL),
    "AdaptiveTokenSampler()": (
        _layer("AdaptiveTokenSampler"),
        {"scores": _tokens(2, 6).softmax(-1)},
        {
            "scores": (_tokens(6), _tokens(2, 6, 1), torch.ones(2, 6, dtype=torch.int64)),
            "mask": MASKS,
            "num_tokens": (0, -1),
        },
    ),
    "ATSViT()": (_layer("ATSViT"), {"images": _tokens(2, 3, 8, 8)}, {"images": (*IMAGES, _tokens(2, 3, 6, 8))}),
    "SepViT()": (_layer("SepViT"), {"images": _tokens(2, 3, 16, 16)}, {"images": IMAGES}),
    "create_model": (
        lambda: narrows.create_model,
        {"name": "vit_mini"},
        {
            "name": ("vit_minni", ""),
            "features_only": (),
            "out_indices": (0, (1, 2)),
            "num_classes": (-1, "ten", None, 2.5),
            "image_size": (0, -3, "big", None),
            "channels": (0, -1, "rgb", None),
            "depth": (0, -1, "deep"),
            "dim": (0, -8, 7.5),
        },
    ),
    "list_models": (lambda: narrows.list_models, {}, {"task": ("object", "")}),
    "load_model": (lambda: narrows.load_model, {"folder": "nowhere"}, {"folder": ("nowhere", "", Path(__file__))}),
    "from_upstream": (lambda: narrows.from_upstream, {"module": nn.Linear(2, 2)}, {"module": (nn.Linear(2, 2),)}),
    "measure": (
        lambda: narrows.measure,
        {"model": nn.Linear(8, 2), "inputs": _tokens(2, 8), "repeats": 1, "warmup": 0},
        {
            "inputs": ((), {}, (3,), "x", None, _tokens(0, 8), torch.tensor(1.0)),
            "repeats": (0, -1),
            "warmup": (-1,),
        },
    ),
    "audit": (
        lambda: narrows.audit,
        {
            "model": _flamingo,
            "batch": {"input_ids": torch.tensor([[1, 5, 6]]), "media": _tokens(1, 1, 3, 8)},
            "media_token_id": 1,
        },
        {
            "batch": ({}, {"input_ids": torch.tensor([[1, 5]])}, 3, "batch"),
            "media": ("images", ""),
            "tokens_per_medium": (0, -1),
            "media_axis": (2, -1),
            "tolerance": (-1.0,),
        },
    ),
    "reduce_tokens": (
        lambda: lambda model=None, **options: narrows.reduce_tokens(_vit() if model is None else model, **options),
        {"budget": 0.5},
        {
            "model": (nn.Linear(2, 2),),
            "method": ("fastest", "", 3, object()),
            "budget": (
                0,
                -1,
                0.0,
                1.5,
                math.nan,
                math.inf,
                "half",
                None,
                (),
                (0.5, 0.5),
                {99: 0.5},
                {"a": 0.5},
                object(),
            ),
            "execution": ("quick", "", 3),
            "generator": (0, "seed", object()),
        },
    ),
}


def _bad_values(annotation: Any, default: Any) -> Iterator[Any]:
    """Values of the wrong kind for what is annotated so."""
    allowed = set(getattr(annotation, "__args__", ())) if _is_union(annotation) else {annotation}
    kinds = {kind for kind in map(_kind, allowed) if kind is not None}
    if len(kinds) != 1 or kinds != set(map(_kind, allowed - {NoneType})):
        return
    (kind,) = kinds
    yield from BAD_OF_KIND[kind]
    if NoneType not in allowed and default is not None:
        yield None
    if kind in (int, float):
        yield True


def _is_union(annotation: Any) -> bool:
    return type(annotation).__name__ in ("UnionType", "_UnionGenericAlias", "Union")


def _kind(annotation: Any) -> type | None:
    if getattr(annotation, "array_type", None) is Tensor:
        return Tensor
    if annotation is torch.device:
        return torch.device
    return annotation if isinstance(annotation, type) and annotation in BAD_OF_KIND else None


def _cases() -> Iterator[tuple[str, str, Any, Callable[[], Any]]]:
    """Name, parameter, bad value, and the call with it."""
    for name, (arguments, ranges) in CONSTRUCTORS.items():
        target = getattr(narrows, name)
        yield from _cases_of(name, partial(_identity, target), target.__init__, arguments, ranges)
    for name, (make, arguments, ranges) in CALLS.items():
        function = getattr(narrows, name) if not name.endswith("()") else getattr(narrows, name[:-2]).forward
        yield from _cases_of(name, make, function, arguments, ranges)


def _identity(target: Any) -> Any:
    return target


def _cases_of(
    name: str,
    make: Callable[[], Callable[..., Any]],
    function: Callable[..., Any],
    arguments: dict[str, Any],
    ranges: dict[str, tuple[Any, ...]],
) -> Iterator[tuple[str, str, Any, Callable[[], Any]]]:
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    for parameter in dict.fromkeys((*parameters, *ranges)):
        default = parameters[parameter].default if parameter in parameters else inspect.Parameter.empty
        bad = [*ranges.get(parameter, ()), *_bad_values(hints.get(parameter), default)]
        for value in bad:
            yield name, parameter, value, partial(_call, make, arguments, parameter, value)


def _call(make: Callable[[], Callable[..., Any]], arguments: dict[str, Any], *bad: Any) -> Any:
    made = {name: argument() for name, argument in arguments.items() if any(argument is made for made in MODELS)}
    given = arguments | made
    return make()(**given | ({bad[0]: bad[1]} if bad else {}))


WITHOUT_ARGUMENTS = {"AllPrevious", "ConsecutiveGroup", "LastMedium", "NarrowsError", "__version__"}
RESULTS = {"Audit", "Cost", "Reduction"}
"""What calls return; nobody makes them."""

REFUSED = {"load_model", "from_upstream"}
"""Calls that need files, or another package, to be well formed."""


def test_every_public_name_is_tried() -> None:
    tried = {name.removesuffix("()") for name in (*CONSTRUCTORS, *CALLS)}
    assert set(narrows.__all__) == tried | WITHOUT_ARGUMENTS | RESULTS
    assert sum(1 for _ in _cases()) >= 1000


def _well_formed() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (arguments, _) in CONSTRUCTORS.items():
        yield name, partial(_call, partial(_identity, getattr(narrows, name)), arguments)
    for name, (make, arguments, _) in CALLS.items():
        if name not in REFUSED:
            yield name, partial(_call, make, arguments)


@pytest.mark.parametrize("name", [name for name, _ in _well_formed()])
def test_the_call_without_a_bad_argument_is_well_formed(name: str) -> None:
    dict(_well_formed())[name]()


@pytest.mark.parametrize("name", [*CONSTRUCTORS, *CALLS])
def test_every_bad_argument_is_a_clear_error(name: str) -> None:
    unclear = []
    for _, parameter, value, call in filter(lambda case: case[0] == name, _cases()):
        try:
            call()
        except NarrowsError as error:
            if len(str(error)) > 1500 or not str(error).strip():
                unclear.append(f"{parameter}={value!r}: a message of {len(str(error))} characters")
        except Exception as error:
            unclear.append(f"{parameter}={value!r}: {type(error).__name__}: {error}")
        else:
            unclear.append(f"{parameter}={value!r}: accepted")
    assert not unclear, "\n".join(unclear)
