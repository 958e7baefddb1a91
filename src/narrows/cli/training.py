"""`narrows fit`, `validate`, `test` and `predict`: Lightning's command line on narrows' models and images."""

import logging
import warnings
from collections.abc import Sequence
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from narrows.cli.parsing import ClearErrors, underscored
from narrows.errors import InvalidArgument, MissingExtra, NarrowsError

try:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
except ImportError as error:
    raise MissingExtra(error.name or "lightning", extra="train", purpose="train") from error

from narrows.data import ImageDataModule
from narrows.tasks.callbacks import PredictionTable, SavePretrained
from narrows.tasks.classification import Classification

# What Lightning says and does not hold here: arguments come from `main`, and `ImageDataModule` resumes where it was.
_BESIDE_THE_POINT = (
    "LightningCLI's args parameter is intended to run from within Python",
    "isinstance.treespec, LeafSpec.. is deprecated",
    "your dataloader is not resumable",
    "does not have many workers",
)
_CHECKPOINT_WORDS = ("best", "last", "hpc")


class TrainingParser(ClearErrors, LightningArgumentParser):
    """Lightning's parser with clear errors."""


class TrainingCLI(LightningCLI):
    """`Classification` on an `ImageDataModule`. Everything of a run is in one folder, `runs/<time>` by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data say what the model has to fit; the best and the last state are kept."""
        for name in ("num_classes", "image_size", "channels"):
            parser.link_arguments("data", f"model.{name}", _of_loaded(name), apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
            }
        )

    def before_instantiate_classes(self) -> None:
        """A checkpoint has to be there, and only training can do without one."""
        given = self._get(self.config, "ckpt_path")
        if given is None and self.subcommand != "fit":
            raise InvalidArgument(
                "ckpt_path",
                expected="the checkpoint to look at",
                got=None,
                hint="Add --ckpt_path <run>/checkpoints/...",
            )
        if given is not None and given not in _CHECKPOINT_WORDS and not Path(given).exists():
            raise InvalidArgument("ckpt_path", expected="a checkpoint file", got=f"{given!r}, which does not exist")

    def instantiate_classes(self) -> None:
        """Errors of narrows come out as they are."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, NarrowsError):  # jsonargparse wraps what goes wrong while it links
                raise error.__cause__ from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to CSV and TensorBoard unless told otherwise."""
        asked = self._get(self.config_init, "trainer")
        if asked["logger"] in (None, True):
            kwargs["logger"] = _loggers(Path(asked["default_root_dir"] or "runs"))
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = self.trainer.log_dir  # every process has to ask
        if self.trainer.is_global_zero and folder is not None:
            print(f"Checkpoints, metrics and the model are in {folder}")

    def after_predict(self) -> None:
        """Say where the table is."""
        if self.trainer.is_global_zero:
            print(f"Predictions are in {_only(self.trainer, PredictionTable).path}")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if self.trainer.interrupted:
                raise KeyboardInterrupt(self._kept()) from None
            raise

    def _kept(self) -> str:
        last = Path(_only(self.trainer, ModelCheckpoint).last_model_path)
        if not last.name:
            return "No checkpoint had been written yet."
        return f"Go on with: narrows fit --config {last.parent.parent / 'config.yaml'} --ckpt_path {last}"


def run(arguments: list[str]) -> None:
    """Run one of Lightning's commands."""
    for remark in _BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", f".*{remark}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    TrainingCLI(
        Classification,
        ImageDataModule,
        args=_short_forms(underscored(arguments)),
        parser_class=TrainingParser,
        parser_kwargs={"prog": "narrows"},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "max_epochs": 20,
            "enable_model_summary": False,
            "callbacks": [SavePretrained(), PredictionTable()],
        },
    )


def _short_forms(arguments: Sequence[str]) -> list[str]:
    """`--data digits` for `--data.data digits`, `--model vit_mini` for `--model.model vit_mini`; files are configs."""
    found = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, _, value = argument.partition("=")
        if option in ("--data", "--model") and Path(value or following).suffix not in (".yaml", ".yml", ".json"):
            argument = argument.replace(option, f"{option}.{option[2:]}", 1)
        found.append(argument)
    return found


def _of_loaded(name: str) -> Any:
    def read(data: ImageDataModule) -> int:
        return getattr(data.loaded, name)

    return read


def _only(trainer: Trainer, kind: type) -> Any:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))  # pyright: ignore
    return callback


def _loggers(root: Path) -> Sequence[Logger]:
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = len(list(root.glob(f"{time}*")))
    run = f"{time}_{taken + 1}" if taken else time
    return [CSVLogger(root, name="", version=run), TensorBoardLogger(root, name="", version=run)]
