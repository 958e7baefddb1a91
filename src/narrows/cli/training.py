"""`narrows fit`, `validate`, `test` and `predict`: Lightning's command line on narrows' models and images."""

import csv
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

from narrows.cli import COMMANDS, answer
from narrows.cli.parsing import ClearErrors, lists_of, underscored, with_lists
from narrows.cli.shorthand import FIRST, SHORT, TASK, first_help, read_checkpoint, short_forms, task_of
from narrows.data.module import (
    ImageDataModule,
    ImagesOf,
    ObjectDataModule,
    PositionedDataModule,
    SegmentationDataModule,
)
from narrows.errors import InvalidArgument, MissingExtra, NarrowsError, Terminated
from narrows.files import new_folder, replacing
from narrows.jobs.fit import classification, objects, segmentation
from narrows.screen import say
from narrows.training.callbacks import ClassMaps, PredictionTable, RunProgress, SavePretrained
from narrows.training.checkpoints import Checkpoints, StopOnSignal, WholeFiles
from narrows.training.run import trainer_device
from narrows.training.task import Task
from narrows.validation import check_device

# Warnings of Lightning that do not apply: arguments come from `main`, `ImageDataModule` resumes in the middle of an
# epoch, frozen modules are in evaluation mode on purpose, and every run has a folder of its own.
_DO_NOT_APPLY = (
    "The dirpath has changed",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
    "LightningCLI's args parameter is intended to run from within Python",
    "isinstance.treespec, LeafSpec.. is deprecated",
    "your dataloader is not resumable",
    "does not have many workers",
    r"Found \d+ module.s. in eval mode",
)
OPTIONS = "narrows_options"
"""Where a checkpoint has the options of its model and its data."""
IMAGES = "narrows_images"
"""Where a checkpoint has what its model has to fit of the images."""

IMPORTS = ("narrows", "lightning", "torch.nn", "torch.optim", "torchmetrics", "torchvision", "timm", "transformers")
"""Where the classes are that a configuration may name as its `class_path`."""

# What the backends say of a process that is gone.
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)")
_CHECKPOINT_WORDS = ("best", "last", "hpc")


class Link(NamedTuple):
    """An option of the model that is read from the data, or the other way round, so that nobody has to give it."""

    source: str
    target: str
    value: Callable[[Any], Any]


class Choice(NamedTuple):
    """What a task brings: what makes it, its data, the metric that tells the best model, what it leaves."""

    task: Callable[..., Task]
    data: type[PositionedDataModule]
    monitor: str
    predictions: type[BasePredictionWriter] | None
    links: Sequence[Link]
    mode: str = "max"
    saving: type[Callback] = SavePretrained


def _of_images(name: str) -> Link:
    """The model has to fit the images, or those of its checkpoint where no image is needed."""

    def value(data: Any) -> int:
        known = data.trained_on
        if known is None:
            return getattr(data.loaded, name)
        return data.image_size or known.image_size if name == "image_size" else getattr(known, name)

    return Link("data", f"model.{name}", value)


def _flamingo() -> Choice:
    """The images have to fit the vision encoder. Imported when asked for: no other task needs transformers."""
    try:
        from narrows.data.document_module import InterleavedDataModule
        from narrows.jobs.fit_flamingo import flamingo
        from narrows.training.flamingo import SaveReader
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", extra="transformers", purpose="train a Flamingo") from error
    links = [
        Link("model", "data.tokenizer", lambda model: model.tokenizer),
        Link("model", "data.image_size", lambda model: model.vision_encoder.image_size),
        Link("model", "data.channels", lambda model: model.vision_encoder.channels),
    ]
    return Choice(flamingo, InterleavedDataModule, "val/loss", None, links, "min", SaveReader)


_SHAPE = [_of_images(name) for name in ImagesOf._fields]
TASKS: dict[str, Callable[[], Choice]] = {
    "classification": lambda: Choice(classification, ImageDataModule, "val/accuracy", PredictionTable, _SHAPE),
    "segmentation": lambda: Choice(segmentation, SegmentationDataModule, "val/mean_iou", ClassMaps, _SHAPE),
    "objects": lambda: Choice(objects, ObjectDataModule, "val/loss", None, _SHAPE[1:], "min"),
    "flamingo": _flamingo,
}


class TrainingParser(ClearErrors, LightningArgumentParser):
    """Lightning's parser with clear errors, and the names of `SHORT` in what it suggests."""

    short = SHORT


class BriefParser(TrainingParser):
    """One whose help is what people set first."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """A screen of it."""
        command = self.prog.split()[-1]
        if command in FIRST:
            return first_help(self, command, COMMANDS[command].summary)
        return super().format_help(*args, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Writes `<run>/config.yaml` whole."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, once."""
        folder = trainer.log_dir  # log_dir is broadcast: every process has to read it
        if trainer.is_global_zero and folder is not None and not self.already_saved:
            with replacing(Path(folder) / self.config_filename) as unfinished:
                self.parser.save(self.config, unfinished, skip_unset=False, overwrite=True, multifile=False)
        self.already_saved = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the options of the model and of the data into the checkpoint."""
        if trainer.state.fn == "fit":
            options = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, skip_link_targets=True))
            checkpoint[TASK] = options["task"]
            checkpoint[OPTIONS] = {part: options[part] for part in ("model", "data")}
            data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(data, ImageDataModule):
                checkpoint[IMAGES] = {name: getattr(data.loaded, name) for name in ImagesOf._fields}


class TrainingCLI(LightningCLI):
    """A task on its images. Everything of a run is in one folder, `runs/<time>` by default.

    Args:
        task: one of `TASKS`; the options of the model are those of its function in `narrows.jobs`.
    """

    def __init__(self, task: str, **kwargs: Any) -> None:
        self.parent = os.getppid()
        self.task, self.choice, self.args = task, TASKS[task](), kwargs["args"]
        self.trained_on: ImagesOf | None = None
        self.device: dict[str, Any] = {}
        left: list[Callback] = [StopOnSignal(), self.choice.saving()]
        if self.choice.predictions is not None:
            left.append(self.choice.predictions())
        defaults = {"max_epochs": 20, "enable_model_summary": False, "callbacks": left}
        super().__init__(self.choice.task, self.choice.data, trainer_defaults=defaults, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link model and data, and keep the best and the last checkpoint."""
        parser.add_argument(
            "--task", type=Literal[*TASKS], default=self.task, help=f"what is trained: {', '.join(TASKS)}"
        )
        parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1" or "mps"')
        for link in self.choice.links:
            parser.link_arguments(link.source, link.target, partial(self._read, link.value), apply_on="instantiate")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": self.choice.monitor,
                "checkpoint.mode": self.choice.mode,
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read lists that are written with commas."""
        if args and args[0] in self._subcommand_parsers:
            listed = lists_of(self._subcommand_parsers[args[0]])
            self.args = [args[0], *with_lists(args[1:], listed)]
        super().parse_arguments(parser, self.args)

    def _read(self, value: Callable[[Any], Any], source: Any) -> Any:
        """What a link reads; from data it is read after they are told what the checkpoint knows of them."""
        if isinstance(source, ImageDataModule):
            source.trained_on = self.trained_on
        return value(source)

    def _parse_ckpt_path(self) -> None:
        """Take what was not given from the checkpoint; Lightning takes what was given from it too.

        Raises:
            InvalidArgument: a setting of the model that is not the one the checkpoint was trained with, or a file that
                is no checkpoint.
        """
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path is None or not Path(path).is_file():
            return
        content = read_checkpoint(path)
        trained, images = content.get(OPTIONS, {}), content.get(IMAGES)
        if command == "predict" and isinstance(images, dict):
            self.trained_on = ImagesOf(**images)
        asked = self.parser.parse_args(self.args, defaults=False)[command]
        for name, value in vars(asked.get("model") or Namespace()).items():
            if name in trained.get("model", {}) and (before := trained["model"][name]) != _plain(value):
                raise InvalidArgument(
                    f"model.{name}",
                    expected=f"{before!r}, with which the checkpoint was trained",
                    got=repr(_plain(value)),
                    hint="Leave it out to go on with the checkpoint, or begin another run with --model <run>/model.",
                )
        unknown = [name for name in trained.get("model", {}) if name not in vars(self.config[command].model)]
        if unknown:
            got = f"one of another task, whose model has {', '.join(unknown[:3])}"
            raise InvalidArgument(
                "checkpoint", expected=f"a checkpoint of {self.task}", got=got, hint="Give its --task."
            )
        given = {part: {**trained[part], **_plain(asked.get(part) or {})} for part in trained}
        self.config = self.parser.parse_object({command: given}, self.config)

    def _add_instantiators(self) -> None:
        """None: they note hyperparameters, which `SaveConfig` does, and jsonargparse will not take them any more."""

    def before_instantiate_classes(self) -> None:
        """Check that the checkpoint is there; only `fit` does without one."""
        if self.subcommand == "predict" and self.choice.predictions is None:
            raise InvalidArgument(
                "task", expected="one that predicts", got=repr(self.task), hint="Use `narrows generate` for text."
            )
        given = self._get(self.config, "ckpt_path")
        if given is None and self.subcommand != "fit":
            raise InvalidArgument(
                "checkpoint",
                expected="the checkpoint to look at",
                got=None,
                hint="Add --checkpoint <run>, the folder of a run of `narrows fit`.",
            )
        if given is not None and given not in _CHECKPOINT_WORDS and not Path(given).exists():
            raise InvalidArgument("checkpoint", expected="a checkpoint file", got=f"{given!r}, which does not exist")
        device = check_device(self._get(self.config, "device"))
        if self._get(self.config, "device") != "auto":
            if (accelerator := self._get(self.config, "trainer.accelerator")) != "auto":
                expected, got = "to be left out where --device is given", repr(accelerator)
                raise InvalidArgument("trainer.accelerator", expected=expected, got=got)
            self.device = trainer_device(device)

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; errors of narrows are raised as they are, which jsonargparse wraps."""
        try:
            # Lightning's own method calls what jsonargparse has deprecated.
            self.config_init = self.parser.instantiate(self.config)
            self.datamodule, self.model = (self._get(self.config_init, name) for name in ("data", "model"))
            self.trainer = self.instantiate_trainer()
        except ValueError as error:
            if isinstance(error.__cause__, NarrowsError):
                raise error.__cause__ from None
            raise
        except MisconfigurationException as error:
            expected, reason = "options that Lightning takes together", str(error).partition("\n")[0]
            raise InvalidArgument("checkpoint", expected=expected, got=f"others ({reason})") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to CSV and TensorBoard, and write checkpoints whole, unless told otherwise."""
        asked = self._get(self.config_init, "trainer")
        own_bar = any(isinstance(callback, ProgressBar) for callback in _listed(asked["callbacks"]))
        if asked["enable_progress_bar"] is not False and not own_bar:
            kwargs["enable_progress_bar"] = False
            self.trainer_defaults["callbacks"].append(RunProgress("training", self.choice.monitor))
        kwargs.update(self.device)
        plugins = _listed(asked["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        if asked["logger"] in (None, True):
            root = Path(asked["default_root_dir"] or "runs")
            # Processes but the first write nothing, and take the folder from it.
            run = new_folder(root).name if getattr(rank_zero_only, "rank", 0) == 0 and not asked["fast_dev_run"] else ""
            kwargs["logger"] = [CSVLogger(root, name="", version=run), TensorBoardLogger(root, name="", version=run)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, NarrowsError):
                raise
            reason = str(error).partition("\n")[0]
            expected = "options that Lightning's Trainer takes together on this machine"
            raise InvalidArgument("trainer", expected=expected, got=f"others ({reason})") from error

    def after_fit(self) -> None:
        """Say how good the model is, and where everything is."""
        folder = self.trainer.log_dir  # log_dir is broadcast: every process has to read it
        if not self.trainer.is_global_zero:
            return
        kept = _only(self.trainer, Checkpoints)
        metrics = _metrics(self.trainer, ("val/",))
        best = {} if kept.best_model_score is None else {kept.monitor: kept.best_model_score.item()}

        def data() -> dict[str, Any]:
            checkpoints = {
                "best_checkpoint": kept.best_model_path or None,
                "last_checkpoint": kept.last_model_path or None,
            }
            return {"metrics": metrics, "best": best, "folder": folder, **checkpoints}

        shown = [f"Best {_read(name, value)}" for name, value in best.items()]
        shown = shown or [_read(name, value) for name, value in metrics.items() if name == self.choice.monitor]
        shown += [f"Checkpoints, metrics and the model are in {folder}"] if folder is not None else []
        answer("fit", data, *shown)

    def validate(self, **options: Any) -> None:
        """Print the metrics as they are read."""
        self._judge("validate", **options)

    def test(self, **options: Any) -> None:
        """Print the metrics as they are read."""
        self._judge("test", **options)

    def _judge(self, command: str, **options: Any) -> None:
        getattr(self.trainer, command)(**{**options, "verbose": False})
        if self.trainer.is_global_zero:
            metrics = _metrics(self.trainer, ("val/", "test/"))
            answer(command, lambda: {"metrics": metrics}, *(_read(name, value) for name, value in metrics.items()))

    def after_predict(self) -> None:
        """Say where they are."""
        if self.trainer.is_global_zero:
            assert self.choice.predictions is not None
            path = _only(self.trainer, self.choice.predictions).path
            answer("predict", lambda: _predicted(path), f"Predictions are in {path}")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            asked = stop.__context__
            if not self.trainer.interrupted or not isinstance(asked, KeyboardInterrupt):
                raise
            if not self.trainer.is_global_zero:  # the first process tells, and waits for none that failed
                raise SystemExit(0) from None
            kept = self._kept()
            raise Terminated(getattr(asked, "signum", signal.SIGINT), kept) from None
        except RuntimeError as error:
            if self.trainer.world_size == 1 or not _LOST.search(str(error)):
                raise
            # The first process tells; where it is the one that is gone, the second does.
            orphaned = os.getppid() != self.parent
            if self.trainer.global_rank != int(orphaned):
                raise SystemExit(1) from None
            raise NarrowsError(f"Another process of this run is gone, and this one ends. {self._kept()}") from error

    def _kept(self) -> str:
        last = Path(_only(self.trainer, Checkpoints).last_model_path)
        if not last.name:
            return "No checkpoint had been written yet."
        return f"Go on with: narrows fit --config {last.parent.parent / 'config.yaml'} --checkpoint {last}"


def parsers(task: str = "classification") -> dict[str, Any]:
    """The parsers of `fit`, `validate`, `test` and `predict`, which also know the names in `SHORT`."""

    class Made(Exception):
        """Ends the making of the command line once its parsers are there."""

    class Parsers(TrainingCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            found.update(self._subcommand_parsers)
            raise Made

    found: dict[str, Any] = {}
    with suppress(Made):
        Parsers(task, args=[], parser_class=TrainingParser, auto_configure_optimizers=False)
    for command, parser in found.items():
        for name in FIRST[command]:
            if f"--{name}" not in parser._option_string_actions:
                parser.add_argument(f"--{name}")
    return found


def run(arguments: list[str]) -> None:
    """Run one of Lightning's commands.

    A configuration names classes to import, and importing runs code: only those of `IMPORTS` may be, and of packages
    that `NARROWS_IMPORTS` names.
    """
    own = [name.strip() for name in os.environ.get("NARROWS_IMPORTS", "").split(",") if name.strip()]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*IMPORTS, *own])
    arguments = underscored(arguments)
    everything = "--help_all" in arguments
    arguments = short_forms(["--help" if argument == "--help_all" else argument for argument in arguments])
    task = task_of(arguments, tuple(TASKS))
    stopped = None
    try:
        with _calm_lightning():
            TrainingCLI(
                task,
                args=arguments,
                parser_class=TrainingParser if everything else BriefParser,
                parser_kwargs={"prog": "narrows"},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
            )
    except KeyboardInterrupt as asked:
        stopped = asked
    # Leave the group, but not after an error: the others may be gone, and to leave would be to wait for them.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if stopped is not None:
        raise stopped


@contextmanager
def _calm_lightning() -> Iterator[None]:
    """Lightning tells nothing of what is as it should be, and a warning is a line."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for remark in _DO_NOT_APPLY:
            warnings.filterwarnings("ignore", f".*{remark}")
        warnings.showwarning = lambda message, *_: say(f"Warning: {' '.join(str(message).split())}", "yellow")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _metrics(trainer: Trainer, parts: tuple[str, ...]) -> dict[str, float]:
    """The newest metrics whose names begin with one of `parts`."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(parts)}


def _read(name: str, value: float) -> str:
    """A metric as it is read: "held-out accuracy: 47.1 %"."""
    part, _, what = name.partition("/")
    share = what.removeprefix("attention_") in ("accuracy", "mean_iou", "fg_ari", "mbo")
    number = f"{100 * value:.1f} %" if share else f"{value:.4g}"
    return f"{'held-out' if part == 'val' else part} {what.replace('_', ' ')}: {number}"


def _predicted(path: Path) -> dict[str, Any]:
    """The rows of a table of predictions; of maps where they are."""
    if path.suffix != ".csv":
        return {"folder": path}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{**row, "probability": float(row["probability"])} for row in csv.DictReader(file)]
    return {"file": path, "predictions": rows}


def _listed(value: Any) -> list[Any]:
    """An option that may be one thing, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _only(trainer: Trainer, kind: type) -> Any:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))  # pyright: ignore
    return callback


def _plain(value: Any) -> Any:
    """A value of the parser as YAML has it."""
    if isinstance(value, (Namespace, dict)):
        return {name: _plain(one) for name, one in (value if isinstance(value, dict) else vars(value)).items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
