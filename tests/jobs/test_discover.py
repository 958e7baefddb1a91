import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from narrows.cli import main
from narrows.data import ImageData, SpriteScenes
from narrows.data.module import ObjectDataModule
from narrows.errors import InvalidArgument
from narrows.hub.models import save_model
from narrows.jobs import discover as job
from narrows.jobs.object_models import object_model
from narrows.metrics import FGARI
from narrows.models import ObjectDiscovery, load_model
from tests.data.object_folders import write

SMALL = {"epochs": 1, "precision": "32-true", "device": "cpu", "batch_size": 8}


class FewScenes(ObjectDataModule):
    """A data module of few scenes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, length=16, **kwargs)

    @cached_property
    def loaded(self) -> ImageData:
        found = ObjectDataModule.loaded.func(self)
        if isinstance(found.held_out, SpriteScenes):
            found.held_out._length = 24
        return found


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ObjectDataModule", FewScenes)
    monkeypatch.setattr(job, "NUM_PICTURES", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> job.Discovery:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "ObjectDataModule", FewScenes)
        patch.setattr(job, "NUM_PICTURES", 2)
        return job.discover(output=tmp_path_factory.mktemp("runs"), seeds=2, **SMALL)


def test_every_seed_is_trained_scored_saved_and_shown(trained: job.Discovery) -> None:
    assert [run.seed for run in trained.runs] == [0, 1]
    assert trained.runs[0].fg_ari != trained.runs[1].fg_ari
    for run in trained.runs:
        assert -1 <= run.attention_fg_ari <= 1
        assert 0 < run.attention_mbo < 1
        assert isinstance(load_model(run.folder), ObjectDiscovery)
    assert "±" in str(trained)
    assert [row[0] for row in trained.rows()] == ["0", "1", "mean"]
    assert trained.margin("mbo") > 0
    html = trained.report.read_text(encoding="utf-8")
    assert "FG-ARI" in html
    scored = f"narrows discover --checkpoint {trained.runs[1].folder} --data sprites"
    assert html.count(scored) == 2, "what scores a row again, once to copy and once to read"
    assert re.search(r"finds the objects of 24 held-out images with an FG-ARI of .* ± .* over 2 seeds\)", html)
    assert (trained.folder / "objects.png").stat().st_size > 10_000
    assert (trained.folder / "scores.csv").read_text().startswith("seed,")


def test_a_model_that_was_trained_is_scored_as_before_and_shown(trained: job.Discovery, tmp_path: Path) -> None:
    before = trained.runs[1]
    again = job.discover(checkpoint=before.folder, output=tmp_path, device="cpu").runs[0]
    assert (again.fg_ari, again.attention_mbo) == pytest.approx((before.fg_ari, before.attention_mbo), abs=1e-6)
    assert again.seconds == 0
    assert main(["show", before.folder, "sprites", "--limit", "2", "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("scene*objects.png"))) == 2


def test_seeds_that_are_finished_are_kept(trained: job.Discovery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_train", lambda *_, **__: pytest.fail("trained again"))
    assert job.discover(resume=trained.folder, seeds=2, **SMALL).runs == trained.runs
    with pytest.raises(InvalidArgument, match=r"batch_size: expected 8, with which .* was begun, got 4"):
        job.discover(resume=trained.folder, seeds=3, **{**SMALL, "batch_size": 4})


def test_clips_are_followed_by_savi_from_nothing(tmp_path: Path) -> None:
    found = job.discover(video=True, model="savi", output=tmp_path, **{**SMALL, "batch_size": 4})
    assert load_model(found.runs[0].folder).predictor is not None
    assert 0 < found.runs[0].attention_mbo < 1
    assert not (found.folder / job.FRAMES_FILE).exists()


def test_a_model_of_images_learns_single_frames_before_clips_and_not_again_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, seen = job._train, []

    def stopped(build: Any, images: Any, folder: Path, name: str, seed: int, **options: Any) -> job.ObjectRun:
        seen.append((name, images.data, images.batch_size, options.get("learning_rate"), options.get("losses")))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return train(build, images, folder, name, seed, **options)

    monkeypatch.setattr(job, "_train", stopped)
    options = {**SMALL, "batch_size": 4, "video": True}
    with pytest.raises(KeyboardInterrupt):
        job.discover(output=tmp_path, **options)
    (folder,) = tmp_path.iterdir()
    found = job.discover(resume=folder, **options)
    frames, clips = ("frames", "sprites", 16, None, None), ("slot_autoencoder", "moving_sprites", 4, 1e-3 / 3)
    assert seen == [frames, *2 * [(*clips, job.FOLLOWING)]]
    begun, after = load_model(folder / "models" / "frames-seed0"), load_model(found.runs[0].folder)
    assert (begun.later_iterations, begun.gradient) == (after.later_iterations, after.gradient) == (1, "last")
    before = json.loads((folder / job.FRAMES_FILE).read_text(encoding="utf-8"))
    assert found.runs[0].seconds > before[0]["seconds"] > 0
    assert found.runs[0].attention_mbo != before[0]["attention_mbo"]
    model, data = load_model(found.runs[0].folder), SpriteScenes("held_out", frames=8, length=24)
    clips, truth = data.batch(range(16))
    maps = job.pixel_masks(model(clips, generator=torch.Generator().manual_seed(0)), truth.shape[-2:])[1]
    first = FGARI()
    first.update(maps[0], truth[0])
    assert float(job.scores_of(model, data)[0]["frames_fg_ari"][0]) == pytest.approx(float(first.compute()))
    assert "24 held-out clips" in found.verdict
    assert f"Frame by frame it is {100 * found.runs[0].frames_fg_ari:.1f} %" in found.verdict


def test_a_model_of_images_goes_on_with_clips_from_its_weights(
    trained: job.Discovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, begun = load_model(trained.runs[0].folder), []
    fit = job.fit

    def watched(trainer: Any, task: Any, images: Any) -> None:
        begun.append({name: value.clone() for name, value in task.model.state_dict().items()})
        assert task.hparams["learning_rate"] == pytest.approx(1e-3 / 3)
        assert task.weights["contrast"] == 0.02
        fit(trainer, task, images)

    monkeypatch.setattr(job, "fit", watched)
    options = {**SMALL, "batch_size": 4, "start": trained.runs[0].folder}
    found = job.discover(video=True, seeds=2, output=tmp_path, **options)
    for state in begun:
        torch.testing.assert_close(state, before.state_dict(), rtol=0, atol=0)
    after = load_model(found.runs[1].folder)
    assert (after.predictor, after.later_iterations) == (None, 1)
    assert not torch.equal(after.encoder.head.contract.weight, before.encoder.head.contract.weight)
    assert "--start" in found.command
    assert 0 < found.runs[0].attention_mbo < 1


def test_images_without_masks_are_divided_and_not_scored(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", [f"{n}.jpg" for n in range(40)], [])
    found = job.discover(str(folder), image_size=16, output=tmp_path, **SMALL)
    assert found.runs[0].fg_ari != found.runs[0].fg_ari  # NaN
    assert " - " in str(found)
    assert found.verdict == f"No mask of the {found.held_out} held-out images is known: nothing was scored."
    assert found.verdict in found.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "sprite"}, "data: expected one of sprites"),
        ({"model": "slots"}, "model: expected"),
        ({"model": "dinosaur"}, "backbone: expected a vision model"),
        ({"start": "nope"}, "start: expected a folder with a model of `narrows discover`"),
        ({"start": "{trained}", "num_slots": 4}, "num_slots: expected None where a model goes on from `start`, got 4"),
        ({"start": "{trained}", "checkpoint": "{trained}"}, "checkpoint: expected None where a model goes on"),
        (
            {"start": "{trained}", "image_size": 64},
            "start: expected a model that rebuilds images of 64 pixels, got",
        ),
        ({"backbone": "timm:vit_tiny_patch16_224"}, "backbone: expected None: slot_autoencoder rebuilds pixels"),
        ({"seeds": 0}, "seeds: expected"),
        ({"image_size": 40}, "image_size: expected 8 times a power of two"),
        ({"resume": "nowhere"}, "resume: expected the folder of a call that was stopped"),
        ({"checkpoint": "nowhere"}, "checkpoint: expected a folder with a model"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_folder_is_made(options, message, tmp_path: Path, trained) -> None:
    options = {name: trained.runs[0].folder if value == "{trained}" else value for name, value in options.items()}
    with pytest.raises(InvalidArgument, match=message):
        job.discover(output=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_features_of_a_backbone_are_rebuilt(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("test_vit", num_classes=0).eval()
    save_model(backbone, tmp_path / "vit")
    small = {"num_slots": 3, "slot_dim": 16, "mlp_dim": 16, "decoder": {"hidden_dims": [16]}}
    name = f"timm:local-dir:{tmp_path / 'vit'}"
    model = object_model("dinosaur", image_size=160, backbone=name, **small)
    images = torch.randn(1, 3, 160, 160)
    found = model(images)
    tokens = backbone.forward_features(images)[:, 1:]
    assert found.masks.shape == (1, 3, 10, 10)
    assert torch.allclose(found.target.flatten(2).mT, tokens, atol=1e-5)
    with pytest.raises(InvalidArgument, match="backbone: expected a model with tokens on a grid"):
        object_model("dinosaur", image_size=16, backbone=name)  # one patch
