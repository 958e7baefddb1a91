"""`narrows discover`: objects out of scenes without labels, and how well they were found."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor

from narrows.data import IGNORED, ImageData, ImageSet
from narrows.data.module import ObjectDataModule
from narrows.data.object_scenes import OBJECT_SCENES
from narrows.errors import InvalidArgument
from narrows.files import new_folder, write_text
from narrows.jobs.object_models import object_model, object_picture, open_object_model
from narrows.jobs.report import Result, add_picture, command_of, percent
from narrows.metrics import adjusted_rand_index, best_overlap, count_overlaps
from narrows.models import ObjectDiscovery
from narrows.screen import say
from narrows.training.callbacks import RunProgress
from narrows.training.objects import ObjectTask, find, pixel_masks, signs_of_collapse, state_of
from narrows.training.run import fit, progress_trainer, quiet_lightning
from narrows.training.task import data_of
from narrows.validation import check_choice, check_device, check_positive
from narrows.visualize import Cell

STEPS, CLIP_STEPS = 16_000, 8_000
"""Training steps by default, of images and of clips."""
BATCH, CLIP_BATCH = 16, 4
"""Images and clips in a step by default."""
NUM_PICTURES = 6
SCORES = ("fg_ari", "mbo", "attention_fg_ari", "attention_mbo")
COLUMNS = {
    "seed": None,
    "FG-ARI (attention)": None,
    "FG-ARI (decoder)": None,
    "mBO (decoder)": None,
    "mBO (attention)": None,
    "slots used": None,
    "time": None,
}
RATE = 1e-3
"""Greatest learning rate of a model that begins anew."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
LOSSES: Mapping[str, Mapping[str, Any]] = {"slotcontrast": {"contrast": 0.5}, "videosaur": {"similarity": 0.1}}
"""Weights of the losses that models are trained with, beside the reconstruction."""
FOLLOWING: Mapping[str, Any] = {"contrast": 0.02}
"""The same of a model of images that learns clips: its spare slots would take objects over from others."""
RUNS_FILE, FRAMES_FILE = "runs.json", "frames.json"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class ObjectRun:
    """One model, and what it found in the held-out images.

    Args:
        seed: of weights, order and scenes.
        fg_ari, mbo: of the decoder's masks, mean over images; NaN where there are no masks to compare with.
        attention_fg_ari, attention_mbo: of the attention's.
        deviation: standard deviation of `attention_fg_ari` over images.
        slots_used: slots that have the greatest share of at least 1 % of an image, on average.
        seconds: of training; 0 for a model that was trained before.
        folder: where it is saved; `narrows.load_model` takes it.
        signs: what is wrong with its slots, in words.
        frames_fg_ari: `attention_fg_ari` of clips frame by frame, where a slot may have another object in each; None of
            images.
    """

    seed: int
    fg_ari: float
    mbo: float
    attention_fg_ari: float
    attention_mbo: float
    deviation: float
    slots_used: float
    seconds: float
    folder: str
    signs: tuple[str, ...] = ()
    frames_fg_ari: float | None = None


@dataclass(frozen=True)
class Discovery(Result):
    """Models that found objects, and how well.

    Args:
        runs: one for each seed.
        held_out: number of images that were scored.
        folder: where models, pictures and the report are.
        options: of the command that does the same again.
    """

    runs: Sequence[ObjectRun]
    held_out: int
    folder: Path
    options: Mapping[str, Any]

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Heads of the table."""
        return COLUMNS

    @property
    def command(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The command that trains and scores again."""
        return command_of("discover", **self.options)

    @property
    def codes(self) -> Sequence[str]:
        """For each model the command that scores it again; nothing for their mean."""
        data = {name: self.options[name] for name in ("data", "video", "image_size")}
        found = [command_of("discover", checkpoint=run.folder, **data) for run in self.runs]
        return [*found, ""] if len(self.runs) > 1 else found

    @property
    def verdict(self) -> str:
        """How well objects were found, and how sure that is."""
        mean, margin = fmean(run.attention_fg_ari for run in self.runs), self.margin("attention_fg_ari")
        frames = [run.frames_fg_ari for run in self.runs if run.frames_fg_ari is not None]
        samples = "clips" if self.options.get("video") else "images"
        if not math.isfinite(mean):
            return f"No mask of the {self.held_out:,} held-out {samples} is known: nothing was scored."
        found = f"The slots' attention finds the objects of {self.held_out:,} held-out {samples} with an FG-ARI of"
        found = f"{found} {_percent(mean, margin).text}"
        if len(self.runs) > 1:
            found += f" (95 % interval over {len(self.runs)} seeds)."
        else:
            found += f" (95 % interval over {samples}). One seed does not say how much seeds differ."
        if frames:
            found += f" Frame by frame it is {_percent(fmean(frames)).text}: slots that change objects cost the rest."
        signs = sum(bool(run.signs) for run in self.runs)
        return found + (f" The slots of {signs} of {len(self.runs)} show signs of collapse." if signs else "")

    def margin(self, score: str) -> float:
        """Half of the 95 % interval of a mean score: over seeds (Student's), or over images where there is one seed."""
        values = [getattr(run, score) for run in self.runs]
        if len(values) > 1:
            return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
        return 1.96 * self.runs[0].deviation / math.sqrt(self.held_out) if score == "attention_fg_ari" else math.nan

    def rows(self) -> list[list[object]]:
        """A row for each seed, and one for their mean."""
        rows = [[str(run.seed), *self._scores(run), _slots(run.slots_used), _time(run.seconds)] for run in self.runs]
        if len(self.runs) > 1:
            means = [fmean(getattr(run, name) for run in self.runs) for name in _ORDER]
            cells = [_percent(mean, self.margin(name)) for mean, name in zip(means, _ORDER, strict=True)]
            used, seconds = (fmean(getattr(run, name) for run in self.runs) for name in ("slots_used", "seconds"))
            rows.append(["mean", *cells, _slots(used), _time(seconds)])
        return rows

    def _scores(self, run: ObjectRun) -> list[object]:
        one = len(self.runs) == 1
        return [_percent(getattr(run, name), self.margin(name) if one else math.nan) for name in _ORDER]


_ORDER = ("attention_fg_ari", "fg_ari", "mbo", "attention_mbo")


def discover(
    data: str = "sprites",
    *,
    model: str = "slot_autoencoder",
    checkpoint: str | None = None,
    start: str | None = None,
    backbone: str | None = None,
    video: bool = False,
    seeds: int = 1,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    num_slots: int | None = None,
    precision: str = "bf16-mixed",
    output: str | Path = "runs",
    device: str = "auto",
    resume: str | Path | None = None,
) -> Discovery:
    """Train a model to find objects in images without labels, and say how well it does where masks are known.

    Without arguments: scenes of coloured shapes, which need no download. Models, pictures, logs and `report.html` are
    written to `<output>/<time>/`. `narrows show` takes a model from there.

    Args:
        data: "sprites", "textured_sprites", "crowded_sprites", "sprite_grid", "digit_objects", "moving_sprites",
            "tabletop", "moving_tabletop", a folder of images, or of images and masks (docs/objects.md), or a table of
            `datasets`: "hf:<name>", or a folder that `save_to_disk` wrote.
        model: "slot_autoencoder", "dinosaur", "spot", "savi", "slotcontrast" or "videosaur".
        checkpoint: folder of a model that was trained before: it is scored and drawn, and nothing is trained.
        start: folder of a model that was trained before and goes on from there, at a third of the learning rate: a
            model of images learns clips, or images of another kind. It rebuilds pixels.
        backbone: of models that rebuild features: "timm:<name>", "hf:<name>" or a folder.
        video: clips of eight frames, by default of moving sprites. "slot_autoencoder" learns single frames first, as it
            does without `video`, unless there is a `start`; the others learn from clips alone.
        seeds: how many seeds are trained; two or more give a spread.
        epochs: passes over the training images; by default as many as make 16,000 steps, 8,000 of clips.
        batch_size: images in a training step, or clips, beside four times as many single frames; by default 16, or 4.
        image_size: side of the images in pixels; by default that of the scenes, 128 for a folder.
        num_slots: K; by default the model's.
        precision: of training, as Lightning's trainer takes it: "32-true" where a CPU has no bfloat16.
        output: folder of all runs.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: folder of a call that was stopped: seeds that are finished are kept, the one at hand goes on. The other
            arguments have to be those of that call.

    Raises:
        InvalidArgument: an unknown model, data or device, a number that is not positive, a checkpoint or start that is
            no object model, or one of images of another size, other settings than those of the run that goes on.
        DataError: images that cannot be used.
        CannotWrite: the output folder or the disk refuses.
    """
    batch_size = (CLIP_BATCH if video else BATCH) if batch_size is None else batch_size
    optional = {"epochs": epochs, "num_slots": num_slots, "image_size": image_size}
    check_positive(seeds=seeds, batch_size=batch_size, **{n: v for n, v in optional.items() if v is not None})
    check_choice("precision", precision, PRECISIONS)
    if resume is not None and not Path(resume).is_dir():
        expected, got = "the folder of a call that was stopped", f"{str(resume)!r}, which is none"
        raise InvalidArgument("resume", expected=expected, got=got)
    place = check_device(device)
    if video:
        data = "moving_sprites" if data == "sprites" else data
    follows = video and (start is not None or model == "slot_autoencoder")
    frames = 8 if video else None

    def images(seed: int) -> ObjectDataModule:
        return ObjectDataModule(data, image_size=image_size, frames=frames, batch_size=batch_size, seed=seed)

    def still(seed: int) -> ObjectDataModule:
        name = data.removeprefix("moving_") if data in OBJECT_SCENES else data
        return ObjectDataModule(name, image_size=image_size, batch_size=batch_size * BATCH // CLIP_BATCH, seed=seed)

    found = images(0).loaded
    given = None if checkpoint is None else _given(checkpoint)
    own = {} if num_slots is None else {"num_slots": num_slots}

    def build() -> ObjectDiscovery:
        if start is not None:
            return _started(start, found.image_size)
        return object_model(model, image_size=found.image_size, backbone=backbone, **own)

    if start is not None:
        none = {"checkpoint": checkpoint, "backbone": backbone, "num_slots": num_slots}
        for name, value in none.items():
            if value is not None:
                raise InvalidArgument(name, expected="None where a model goes on from `start`", got=value)
    if given is None:
        build()  # before a folder is made, so that a wrong name shows at once
    settings: dict[str, Any] = {
        "data": data, "model": model, "backbone": backbone, "video": video, "epochs": epochs, "batch_size": batch_size,
        "image_size": image_size, "num_slots": num_slots, "precision": precision, "start": start,
    }  # fmt: skip
    if resume is not None:
        _check_resumed(Path(resume), settings)
    folder = new_folder(output) if resume is None else Path(resume)
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    runs = _finished(folder)
    if given is not None:
        runs = [_judged(given, found, seed=0, seconds=0.0, folder=checkpoint or "")]
    else:
        options: dict[str, Any] = {"device": place, "precision": precision, "epochs": epochs}
        later: dict[str, Any] = {"steps": CLIP_STEPS if video else STEPS, "losses": LOSSES.get(model, {})}
        if follows or start is not None:
            later["learning_rate"] = RATE / 3
        if follows:
            later["losses"] = FOLLOWING
        before = _finished(folder, FRAMES_FILE)
        say(f"{model} on {data}, {seeds} seed(s). Everything goes to {folder}")
        for seed in range(len(runs), seeds):
            begin, seconds = build, 0.0
            if follows and start is None:
                if seed == len(before):
                    before.append(_train(build, still(seed), folder, "frames", seed, steps=STEPS, **options))
                    _keep(before, folder / FRAMES_FILE)
                begin, seconds = partial(_started, before[seed].folder, found.image_size), before[seed].seconds
            run = _train(begin, images(seed), folder, model, seed, **later, **options)
            runs.append(replace(run, seconds=run.seconds + seconds))
            _keep(runs, folder / RUNS_FILE)
    result = Discovery(runs, len(found.held_out), folder, {**settings, "seeds": seeds, "checkpoint": checkpoint})
    network = given if given is not None else open_object_model(runs[0].folder)
    assert network is not None or backbone is not None
    _report(result, network, found, f"{model if given is None else checkpoint} on {data}", place)
    result.write_csv(folder / "scores.csv")
    return result


def _given(folder: str, argument: str = "checkpoint") -> ObjectDiscovery:
    found = open_object_model(folder)
    if found is None:
        expected = "a folder with a model of `narrows discover` or `narrows fit --task objects`"
        raise InvalidArgument(argument, expected=expected, got=repr(folder))
    return found


def _started(folder: str, image_size: int) -> ObjectDiscovery:
    """The model in a folder, to be trained on images of this size."""
    model = _given(folder, "start")
    side = getattr(model.decoder, "image_size", None)
    if side != image_size:
        got = "one that rebuilds features" if side is None else f"one of {side} pixels"
        raise InvalidArgument("start", expected=f"a model that rebuilds images of {image_size} pixels", got=got)
    return model


def _check_resumed(folder: Path, settings: Mapping[str, object]) -> None:
    """Raise unless a run in `folder` was begun with these settings."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise InvalidArgument("resume", expected="the folder of a call that was stopped", got=repr(str(folder)))
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            expected = f"{before.get(name)!r}, with which {folder} was begun"
            raise InvalidArgument(name, expected=expected, got=repr(value))


def _keep(runs: Sequence[ObjectRun], file: Path) -> None:
    write_text(file, json.dumps([asdict(run) for run in runs], indent=2) + "\n")


def _finished(folder: Path, name: str = RUNS_FILE) -> list[ObjectRun]:
    file = folder / name
    runs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [ObjectRun(**{**run, "signs": tuple(run["signs"])}) for run in runs]


def _train(
    build: Any,
    images: ObjectDataModule,
    folder: Path,
    name: str,
    seed: int,
    *,
    steps: int,
    epochs: int | None,
    device: torch.device,
    learning_rate: float = RATE,
    losses: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> ObjectRun:
    length = max(1, len(images.loaded.train) // images.batch_size)
    epochs = math.ceil(steps / length) if epochs is None else epochs
    torch.manual_seed(seed)
    task = ObjectTask(build(), learning_rate=learning_rate, **losses)
    run = f"{name}-seed{seed}"
    trainer = progress_trainer(
        folder / "logs" / run,
        label=run,
        metric="val/attention_fg_ari",
        max_epochs=epochs,
        device=device,
        check_val_every_n_epoch=max(1, epochs // 5),
        **options,
    )
    with quiet_lightning():
        fit(trainer, task, images)
    (progress,) = (callback for callback in trainer.callbacks if isinstance(callback, RunProgress))  # pyright: ignore[reportAttributeAccessIssue]
    place = folder / "models" / run
    model = task.model.to(device).eval()
    assert isinstance(model, ObjectDiscovery)
    judged = _judged(model, images.loaded, seed=seed, seconds=progress.seconds, folder=str(place))
    figures = {"FG-ARI (attention)": judged.attention_fg_ari, "mBO (attention)": judged.attention_mbo}
    model.about = {
        **data_of(images.loaded),
        "Training": f"{trainer.global_step:,} steps of {images.batch_size} images, seed {seed}",
        **{name: _percent(score).text for name, score in figures.items() if math.isfinite(score)},
    }
    model.save_pretrained(place)
    return judged


def _judged(model: ObjectDiscovery, found: ImageData, *, seed: int, seconds: float, folder: str) -> ObjectRun:
    scores, states = scores_of(model, found.held_out)
    means = {name: float(values.nanmean()) for name, values in scores.items()}
    known = scores["attention_fg_ari"]
    known = known[known.isfinite()]
    return ObjectRun(
        seed=seed,
        **means,
        deviation=float(known.std()) if len(known) > 1 else math.nan,
        slots_used=float(states.slots_used),
        seconds=seconds,
        folder=folder,
        signs=tuple(signs_of_collapse(states)),
    )


@torch.no_grad()
def scores_of(
    model: ObjectDiscovery, images: ImageSet, *, batch_size: int = 16, seed: int = 0
) -> tuple[dict[str, Float[Tensor, "N"]], Any]:
    """FG-ARI and mBO of every image or clip, by the masks of decoder and attention, and the state of the slots.

    Initial slots are drawn from `seed`. NaN where no mask is known or no object is there.
    """
    place = next(model.parameters()).device
    generator = torch.Generator(place).manual_seed(seed)
    scores: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    states = []
    model.eval()
    for start in range(0, len(images), batch_size):
        batch, truth = images.batch(range(start, min(start + batch_size, len(images))))
        found = find(model, batch.to(place), truth.to(place), generator)
        states.append(state_of(found))
        decoded, attention = pixel_masks(found, truth.shape[-2:])
        if truth.ndim == 4:
            scores.setdefault("frames_fg_ari", []).append(_frame_by_frame(attention.cpu(), truth))
        for prefix, maps in (("", decoded), ("attention_", attention)):
            overlaps = count_overlaps(maps.movedim(-3, 1).cpu(), truth)
            known = (truth != IGNORED).flatten(1).any(1)
            scores[f"{prefix}fg_ari"].append(adjusted_rand_index(overlaps, foreground=True).where(known, torch.nan))
            scores[f"{prefix}mbo"].append(best_overlap(overlaps).where(known, torch.nan))
    state = type(states[0])(*(torch.stack(values).mean() for values in zip(*states, strict=True)))
    return {name: torch.cat(values) for name, values in scores.items()}, state


def _frame_by_frame(maps: Float[Tensor, "B T K H W"], truth: Int[Tensor, "B T H W"]) -> Float[Tensor, "B"]:
    """The mean FG-ARI of the frames of each clip."""
    frames = adjusted_rand_index(count_overlaps(maps.flatten(0, 1), truth.flatten(0, 1)), foreground=True)
    known = (truth != IGNORED).flatten(2).any(2)
    return frames.unflatten(0, truth.shape[:2]).where(known, torch.nan).nanmean(1)


def _report(
    result: Discovery, model: ObjectDiscovery | None, found: ImageData, subtitle: str, device: torch.device
) -> None:
    report = result.begin_report("Objects without labels", subtitle, device)
    report.section("Scores")
    result.add_table(
        report,
        "Adjusted Rand index of the pixels of true objects (FG-ARI) and mean best overlap (mBO), by the masks of the "
        "slots' attention and of the decoder, with 95 % intervals: over seeds, or over images where there is one seed.",
    )
    for run in result.runs:
        for sign in run.signs:
            report.paragraph(f"Seed {run.seed}: {sign}")
    if model is not None:
        report.section("What was found")
        images, truth = found.held_out.batch(range(min(NUM_PICTURES, len(found.held_out))))
        figure = object_picture(model, images, truth)
        kind, count = (
            ("frames of a held-out clip", images.shape[1]) if images.ndim == 5 else ("held-out images", len(images))
        )
        caption = (
            f"{kind.capitalize()} and what each slot holds. The slot with the most pixels is grey: the background."
        )
        known = (truth != IGNORED).any()
        seen = ", the true objects" if known else ""
        objects = f" The first shows {int(truth[0].max())} objects." if known else ""
        alt = (
            f"A row for each of {count} {kind}: the image{seen}, and in colours which of the slots holds each pixel."
            f"{objects}"
        )
        add_picture(report, figure, result.folder / "objects.png", caption, alt=alt)
    report.section("Use a model")
    report.code(f"import narrows\n\nmodel = narrows.load_model({result.runs[0].folder!r})")
    report.paragraph("opens it; narrows show draws what it finds in your own images.")
    report.write(result.report)


def _percent(share: float, margin: float = math.nan) -> Cell:
    if not math.isfinite(share):
        return Cell(share, "-")
    return percent(share, f" ± {100 * margin:.1f}" if math.isfinite(margin) else "")


def _slots(number: float) -> Cell:
    return Cell(number, f"{number:.1f}")


def _time(seconds: float) -> Cell:
    return Cell(seconds, f"{seconds // 60:.0f} min {seconds % 60:02.0f} s")
