"""`narrows export`: a model, under a token reduction or not, as ONNX or as a program of `torch.export`."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim

from narrows.adapters import reduce_tokens, token_reduction
from narrows.adapters.token_reduction.targets import parse_budget
from narrows.costs import evaluating
from narrows.errors import InvalidArgument, MissingExtra, NarrowsError
from narrows.files import check_writable, replacing_folder
from narrows.hub.models import LoadedModel, open_model
from narrows.validation import check_choice, check_device

BATCHES = (1, 2, 5)
"""Numbers of images that a program is checked with."""
_FORMATS = (".onnx", ".pt2")


@dataclass(frozen=True)
class Exported:
    """A program that was written, and how it was checked.

    Args:
        path: of the file; large weights of ONNX stand in a second file beside it.
        what: the model, and its reduction.
        runtime: what ran the program; empty if nothing could.
        differences: for each `(height, width)`, the greatest difference from the model, over `BATCHES`.
        scale: the greatest number that the model gave.
        notes: what else is to be known.
    """

    path: Path
    what: str
    runtime: str
    differences: dict[tuple[int, int], float]
    scale: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = "any size" if len(self.differences) > 1 else "this size"
        checked = [
            f"  {height} × {width}: differs by at most {difference:.1e}"
            for (height, width), difference in self.differences.items()
        ]
        by = f"Checked in {self.runtime} with batches of {', '.join(map(str, BATCHES))}; the model gives numbers up to "
        checks = [f"{by}{self.scale:.3g}", *checked] if self.runtime else []
        return "\n".join((f"{self.what}, for any number of images of {sizes}: {self.path}", *checks, *self.notes))


def export(
    model: str,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    method: str | None = None,
    budget: str | None = None,
    any_size: bool = False,
    device: str = "auto",
) -> Exported:
    """Write a vision model as ONNX or as a program of torch.export, reduced or not, and check what was written.

    The program takes any number of images. It gives what the model gives: logits, or pooled features.

    Args:
        model: timm:<name>, hf:<name or folder>, a folder written by narrows, or a registry name.
        output: file to write: model.onnx, or model.pt2 for `torch.export.load`.
        checkpoint: a file with weights for the model, as training scripts leave it; nothing is downloaded then.
        checkpoint_key: which weights in that file, "model_ema" or "teacher" say; by default it is found out.
        num_classes: width of the head, 0 for features; by default as the checkpoint or the model has it.
        image_size: side of the images, for models that take any.
        method: a token reduction that is put in first: "ats", "topk", "evit", "tome" or "random".
        budget: how many tokens it keeps: a share (0.5 or 50%), a count (98), MACs per image (2.9G), or shares block by
            block (3:0.7/6:0.49); half of them by default.
        any_size: take images of other heights and widths too, where the model does.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps": where the model is traced.

    Raises:
        InvalidArgument: an unknown model, method or file name, a budget that cannot be met, a model of one size.
        CannotWrite: output cannot be written.
        MissingExtra: without the packages that write ONNX.
        NarrowsError: weights that cannot be downloaded, a model that the exporter cannot trace.
    """
    check_file(output)
    place = check_device(device)
    if method is not None:
        check_choice("method", method, tuple(token_reduction.METHODS))
    elif budget is not None:
        expected = "a method that it is the budget of"
        raise InvalidArgument("budget", expected=expected, got=repr(budget), hint="Add --method.")
    asked = parse_budget(budget or "0.5")
    given = {"checkpoint_key": checkpoint_key, "num_classes": num_classes, "image_size": image_size}
    given = {name: value for name, value in given.items() if value is not None}
    loaded = open_model(model, checkpoint, **given)
    if any_size and loaded.name.startswith("timm:") and not _takes(loaded, _other_sizes(loaded)[0]):
        try:
            loaded = open_model(model, checkpoint, **given, dynamic_img_size=True)
        except InvalidArgument:  # said below, in terms of what was asked for
            any_size = _refuse_size(loaded)
    loaded.module.to(place)
    reduced = nullcontext() if method is None else reduce_tokens(loaded.module, method=method, budget=asked)
    what = f"{loaded.name} under {method} {budget or '0.5'}" if method is not None else loaded.name
    with reduced:
        found = write_program(loaded, output, what=what, any_size=any_size)
    return replace(found, notes=(*(f"{note}." for note in loaded.notes), *found.notes))


def check_file(path: str | Path) -> None:
    """Raise, before anything is opened or measured, if no program can be written there.

    Raises:
        InvalidArgument: a file name that ends in neither .onnx nor .pt2.
        MissingExtra: without the packages that write ONNX.
        CannotWrite: the file cannot be written.
    """
    if Path(path).suffix not in _FORMATS:
        raise InvalidArgument("export", expected="a file name ending in .onnx or .pt2", got=repr(str(path)))
    if Path(path).suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise MissingExtra(package, extra="onnx", purpose="write ONNX")
    check_writable(path)


def write_program(
    model: LoadedModel, output: str | Path, *, what: str | None = None, any_size: bool = False
) -> Exported:
    """Write a model as it is now, reduced or not, for any number of images, and run what was written.

    Args:
        model: the model.
        output: a file name that ends in .onnx or .pt2.
        what: how the model is called in what is said; by default its name.
        any_size: take images of other heights and widths too.

    Raises:
        InvalidArgument: a model that takes one size of images only.
        NarrowsError: the exporter cannot trace the model.
        CannotWrite: the file cannot be written.
    """
    path, sizes = Path(output), [model.size]
    if any_size:
        sizes += _other_sizes(model)
        if not _takes(model, sizes[1]):
            _refuse_size(model)
    answers = _Answers(model, any_size)
    dynamic: dict[int, Any] = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {})}
    example = _images(model, 2, sizes[-1])
    with evaluating(model.module), torch.no_grad(), _quiet():
        try:
            program = torch.export.export(answers, (example,), dynamic_shapes=(dynamic,), strict=False)
            # A folder, since weights may go into a second file, whose name is in the first.
            with replacing_folder(path.parent) as unfinished:
                file = unfinished / path.name
                if path.suffix == ".pt2":
                    torch.export.save(program, file)
                else:
                    written = torch.onnx.export(
                        program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["output"]
                    )
                    assert written is not None, "it returns the program unless it is given a file"
                    written.save(file)
        except NarrowsError:
            raise
        except Exception as error:  # exporters fail in ways of their own
            reason = next((line for line in str(error).splitlines() if line.strip()), "")[:300]
            size = " Without any_size it may be." if any_size else ""
            raise NarrowsError(
                f"{model.name} cannot be exported as {path.suffix[1:]} for any number of images: "
                f"{type(error).__name__}: {reason}.{size}"
            ) from error
        return _checked(model, answers, path, sizes, what or model.name)


def _checked(
    model: LoadedModel, answers: nn.Module, path: Path, sizes: Sequence[tuple[int, int]], what: str
) -> Exported:
    run, runtime, notes = _runner(path, model.device)
    if run is None:
        return Exported(path, what, "", dict.fromkeys(sizes, float("nan")), 0.0, notes)
    differences, scale = {}, 0.0
    for size in sizes:
        for batch in BATCHES:
            images = _images(model, batch, size)
            expected = answers(images)
            try:
                got = run(images)
            except (AssertionError, RuntimeError) as error:
                reason = str(error).partition("\n")[0][:160]
                notes += (f"It does not take images of {size[0]} × {size[1]}: {reason}",)
                break
            scale = max(scale, expected.abs().max().item())
            differences[size] = max(differences.get(size, 0.0), (got - expected).abs().max().item())
    if differences and max(differences.values()) > 1e-4 * max(1.0, scale):
        notes += ("That is more than roundings. Tokens of nearly equal scores may be chosen otherwise; look at it.",)
    return Exported(path, what, runtime, differences, scale, notes)


def _runner(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor] | None, str, tuple[str, ...]]:
    """What runs the program, its name, and what is to be said if nothing does."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module(), f"PyTorch {torch.__version__}", ()
    try:
        import onnxruntime
    except ImportError:
        return None, "", ("Not checked: that needs onnxruntime (pip install 'narrows[onnx]')",)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0]).to(device)

    return run, f"ONNX Runtime {onnxruntime.__version__}", ()


class _Answers(nn.Module):
    """A model as a module that gives one tensor: logits or pooled features."""

    def __init__(self, model: LoadedModel, any_size: bool) -> None:
        super().__init__()
        self.module, self._model = model.module, model
        self._options = _options(model) if any_size else {}

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B width"]:
        return self._model.outputs(images, **self._options)


def _options(model: LoadedModel) -> dict[str, Any]:
    """By which a model of transformers takes another size than its own."""
    name = "interpolate_pos_encoding"
    takes = model.name.startswith("hf:") and name in signature(model.module.forward).parameters
    return {name: True} if takes else {}


def _other_sizes(model: LoadedModel) -> list[tuple[int, int]]:
    """Two sizes beside the model's own, of whole patches, of odd and even numbers of them."""
    convolution = next((part for part in model.module.modules() if isinstance(part, nn.Conv2d)), None)
    stride = 32 if convolution is None or convolution.stride[0] < 8 else int(convolution.stride[0])
    height, width = model.size
    return [(height + stride, width), (height + stride, width + 3 * stride)]


def _takes(model: LoadedModel, size: tuple[int, int]) -> bool:
    try:
        with evaluating(model.module), torch.no_grad():
            model.outputs(_images(model, 1, size), **_options(model))
    except Exception:  # every model refuses sizes in its own way
        return False
    return True


def _refuse_size(model: LoadedModel) -> bool:
    raise InvalidArgument("any_size", expected="a model that takes images of any size", got=model.name)


def _images(model: LoadedModel, batch: int, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.channels, *size, generator=generator).to(model.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own workings."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)
