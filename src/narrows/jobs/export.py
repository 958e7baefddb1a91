"""A reduced model as ONNX."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument, MissingExtra
from narrows.hub.models import LoadedModel
from narrows.jobs.trials import Trial, applied
from narrows.measure import evaluating


def check_export(path: str | Path) -> None:
    """Raise, before anything is measured, if nothing could be written there.

    Raises:
        InvalidArgument: a file name that does not end in .onnx.
        MissingExtra: without the packages that write ONNX.
    """
    if Path(path).suffix != ".onnx":
        raise InvalidArgument("export", expected="a file name ending in .onnx", got=repr(str(path)))
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtra(package, extra="onnx", purpose="write ONNX")


def export_onnx(opened: LoadedModel, trial: Trial, images: Float[Tensor, "B C H W"], path: str | Path) -> None:
    """Write the model under a reduction, for any number of images of this size."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with applied(trial.reduction), evaluating(opened.module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            opened.module,
            (images[:2],),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
            input_names=["images"],
        )
