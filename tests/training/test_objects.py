import logging
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

from narrows.data import IGNORED
from narrows.data.module import ObjectDataModule
from narrows.errors import InvalidArgument
from narrows.metrics import FGARI, MBO
from narrows.models import ObjectDiscovery, ObjectDiscoveryOutput
from narrows.ops.object_hints import object_hints
from narrows.training.objects import ObjectTask, State, pixel_masks, signs_of_collapse, state_of
from tests.data.object_folders import write
from tests.training.small import small_trainer


def task(initial_slots: str = "learned", **kwargs: object) -> ObjectTask:
    torch.manual_seed(0)
    model = ObjectDiscovery(
        {"kind": "convolutions", "width": 8},
        {"kind": "broadcast", "image_size": 16, "width": 8},
        num_slots=3,
        slot_dim=8,
        initial_slots=initial_slots,
    )
    return ObjectTask(model, **kwargs)


def data(**kwargs: object) -> ObjectDataModule:
    return ObjectDataModule("sprites", **{"image_size": 16, "batch_size": 8, "length": 64, **kwargs})


def one(*batch: torch.Tensor) -> DataLoader:
    return DataLoader([batch], batch_size=None)


def test_training_lowers_the_loss(tmp_path):
    found, images = task(learning_rate=1e-2), data().loaded.train.batch(range(8))
    before = found.model(images[0]).loss
    batches = DataLoader([images] * 30, batch_size=None)
    small_trainer(tmp_path, max_epochs=1, limit_train_batches=30, enable_checkpointing=False).fit(found, batches)
    assert found.model(images[0]).loss < 0.9 * before


def test_logged_scores_are_those_of_all_held_out_images(tmp_path):
    found, scenes = task(), data()
    scenes.loaded.held_out._length = 20
    (logged,) = small_trainer(tmp_path, limit_val_batches=1.0).validate(found, scenes, verbose=False)
    images, truth = scenes.loaded.held_out.batch(range(20))
    output = found.model(images)
    assert logged["val/loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    attention = F.interpolate(output.attention, (16, 16), mode="bilinear")
    for name, metric in (("fg_ari", FGARI()), ("mbo", MBO())):
        for prefix, masks in (("", output.masks), ("attention_", attention)):
            metric.reset()
            metric.update(masks, truth)
            assert logged[f"val/{prefix}{name}"] == pytest.approx(metric.compute().item(), rel=1e-5)


def test_a_clip_is_one_sample_in_the_scores(tmp_path):
    found, clips = task(), data(frames=3)
    clips.loaded.held_out._length = 8
    (logged,) = small_trainer(tmp_path, limit_val_batches=1.0).validate(found, clips, verbose=False)
    images, truth = clips.loaded.held_out.batch(range(8))
    metric = FGARI()
    metric.update(found.model(images).masks.transpose(1, 2), truth)
    assert logged["val/fg_ari"] == pytest.approx(metric.compute().item(), rel=1e-5)


def test_padding_does_not_count_and_images_without_masks_have_a_loss_and_no_scores(tmp_path):
    found = task()
    images, truth = data().loaded.held_out.batch(range(8))
    trainer = small_trainer(tmp_path, limit_val_batches=1.0)
    padded = torch.cat((truth[:5], torch.full_like(truth[5:], IGNORED)))
    (counted,) = trainer.validate(found, one(images[:5], truth[:5]), verbose=False)
    (with_padding,) = trainer.validate(found, one(images, padded), verbose=False)
    assert with_padding == pytest.approx(counted, rel=1e-5)
    (unknown,) = trainer.validate(found, one(images, torch.full_like(truth, IGNORED)), verbose=False)
    assert unknown.keys() == {"val/loss"}
    assert unknown["val/loss"] == pytest.approx(found.model(images).loss.item(), rel=1e-5)


def _output(owner: torch.Tensor, number: int, slots: torch.Tensor) -> ObjectDiscoveryOutput:
    masks = F.one_hot(owner, number).movedim(-1, 1).float()
    image = torch.zeros(len(owner), 3, *owner.shape[1:])
    return ObjectDiscoveryOutput(slots, masks, masks, image, image, None)


def test_the_state_of_slots_says_how_many_are_used_and_how_alike_they_are():
    owner = torch.zeros(2, 20, 20, dtype=torch.long)
    owner[0, :10], owner[1, 0, :3] = 1, 2  # half of the pixels; three of 400: less than 1 %
    different = torch.eye(3).expand(2, 3, 3)
    state = state_of(_output(owner, 3, different))
    assert state.slots_used == 1.5
    assert state.entropy == 0
    assert state.similarity == pytest.approx(-0.5)
    even = _output(owner, 3, different)._replace(attention=torch.full((2, 3, 4, 4), 1 / 3))
    assert state_of(even).entropy == pytest.approx(1)
    alike = torch.randn(2, 1, 3).expand(2, 3, 3)
    assert state_of(_output(owner, 3, alike)).similarity == pytest.approx(1)
    clip = _output(owner, 3, different)
    clip = ObjectDiscoveryOutput(*(None if each is None else each[:, None] for each in clip))
    assert state_of(clip).slots_used == 1.5


def test_collapse_is_named_with_what_to_try(tmp_path, caplog):
    def signs(used: float, entropy: float, similarity: float) -> list[str]:
        return signs_of_collapse(State(*map(torch.tensor, (used, entropy, similarity))))

    assert signs(4.0, 0.5, 0.1) == []
    assert "one slot takes everything. Try" in signs(1.0, 0.5, 0.1)[0]
    assert "divided evenly" in signs(4.0, 0.99, 0.1)[0]
    assert "all slots are alike. Try" in signs(4.0, 0.5, 0.99)[0]
    collapsed = task(learning_rate=1e-12)
    with torch.no_grad():
        collapsed.model.slot_attention.initial_slots.slots[:] = 1.0
    with caplog.at_level(logging.WARNING, "narrows"):
        small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(collapsed, data())
    assert "After 3 steps: all slots are alike" in caplog.text


def test_contrast_needs_clips(tmp_path):
    trainer = small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, limit_val_batches=0)
    with pytest.raises(InvalidArgument, match="contrast: expected 0 for images"):
        trainer.fit(task(contrast=0.5), data())
    trainer = small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, limit_val_batches=0)
    found = task(contrast=0.5)
    trainer.fit(found, data(frames=2))
    assert math.isfinite(trainer.callback_metrics["train/gradient_norm"])
    assert trainer.callback_metrics["train/slots_used"] >= 1


@pytest.mark.parametrize("frames", [None, 2])
def test_hints_are_the_boxes_of_the_first_frame(tmp_path, frames):
    found, scenes = task("boxes"), data(frames=frames)
    scenes.loaded.held_out._length = 8
    trainer = small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    before = found.model.slot_attention.initial_slots.expand.weight.clone()
    trainer.fit(found, scenes)
    assert not torch.equal(found.model.slot_attention.initial_slots.expand.weight, before)
    (logged,) = trainer.validate(found, scenes, verbose=False)
    images, truth = scenes.loaded.held_out.batch(range(8))
    hints = object_hints(truth if frames is None else truth[:, 0], 3)
    assert logged["val/loss"] == pytest.approx(found.model(images, hints=hints).loss.item(), rel=1e-5)


CLIPS = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(3))


def of_features(kind="mixer", adaptive=False, preheated=False, **kwargs):
    torch.manual_seed(0)
    model = ObjectDiscovery(
        {"kind": "features", "feature_dim": 12},
        {"kind": kind, "feature_dim": 12, "grid": [3, 3], "hidden_dims": [16], "transitions": True},
        num_slots=3,
        slot_dim=8,
        initial_slots="learned",
        mlp_dim=0,
        normed_state=True,
        predictor_heads=2,
        predictor_pre_norm=True,
        adaptive=adaptive,
        preheated=preheated,
    )
    return ObjectTask(model, **kwargs)


@pytest.mark.parametrize("kind", ["mlp", "mixer"])
def test_the_loss_is_the_weighted_sum_of_what_is_asked_for(kind):
    options = {"contrast": 0.5, "similarity": 0.1, "similarity_temperature": 0.25, "contrast_temperature": 0.2}
    found = of_features(kind, **options)
    output = found.model(CLIPS)
    features, logits = CLIPS, output.transitions[:, :-1]
    cosines = F.cosine_similarity(features[:, :-1, :, None], features[:, 1:, None], dim=-1)
    where = cosines.masked_fill(cosines < 0, -torch.inf).div(0.25).softmax(-1)
    similarity = -(where * logits.log_softmax(-1)).sum(-1).mean()
    unit = F.normalize(output.slots, dim=-1).transpose(0, 1).flatten(1, 2)
    contrast = torch.stack([F.cross_entropy(unit[t] @ unit[t + 1].T / 0.2, torch.arange(6)) for t in (0, 1)]).mean()
    losses = found._losses(output)
    assert losses.keys() == {"reconstruction", "contrast", "similarity"}
    torch.testing.assert_close(losses["reconstruction"], (output.reconstruction - output.target).square().mean())
    torch.testing.assert_close(losses["contrast"], contrast)
    torch.testing.assert_close(losses["similarity"], similarity)
    gradients = []
    for total in (sum(found.weights[name] * value for name, value in losses.items()),
                  output.loss + 0.5 * contrast + 0.1 * similarity):  # fmt: skip
        gradients.append(torch.autograd.grad(total, found.model.slot_attention.to_k.weight, retain_graph=True)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "mixer"])
@pytest.mark.parametrize("reconstruction", [0.0, 1.0])
def test_temporal_losses_are_trained_and_logged(tmp_path, kind, reconstruction):
    found = of_features(kind, contrast=0.5, similarity=0.1, reconstruction=reconstruction, learning_rate=1e-2)
    truth = torch.full((2, 3, 6, 6), IGNORED)
    before = {name: value.clone() for name, value in found.model.named_parameters()}
    first = found._losses(found.model(CLIPS))
    batches = DataLoader([(CLIPS, truth)] * 30, batch_size=None)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=30, enable_checkpointing=False)
    trainer.fit(found, batches)
    after = found._losses(found.model(CLIPS))
    assert after["similarity"] < first["similarity"]
    assert after["contrast"] < first["contrast"]
    assert not [name for name, value in found.model.named_parameters() if torch.equal(value, before[name])]
    logged = {name for name in trainer.callback_metrics if name.startswith("train/")}
    assert {"train/contrast", "train/similarity"} <= logged
    assert ("train/reconstruction" in logged) == bool(reconstruction)


def test_preheated_slots_come_closer_to_what_they_become(tmp_path):
    found = of_features(preheated=True, learning_rate=1e-2)
    first = found._losses(found.model.eval()(CLIPS))["distillation"]
    batches = DataLoader([(CLIPS, torch.full((2, 3, 6, 6), IGNORED))] * 40, batch_size=None)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=40, enable_checkpointing=False)
    trainer.fit(found, batches)
    output = found.model.eval()(CLIPS)
    assert found._losses(output)["distillation"] < 0.5 * first
    assert "train/distillation" in trainer.callback_metrics
    torch.testing.assert_close(
        found._losses(output)["distillation"], (output.guess - output.slots[:, 0]).square().mean()
    )


def test_held_out_clips_are_judged_by_what_is_trained(tmp_path):
    found = of_features(similarity=0.1, reconstruction=0.5)
    truth = torch.zeros(2, 3, 6, 6, dtype=torch.long)
    (logged,) = small_trainer(tmp_path, limit_val_batches=1.0).validate(found, one(CLIPS, truth), verbose=False)
    output = found.model(CLIPS)
    expected = 0.5 * output.loss + 0.1 * found._similarity(output)
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_slots_are_dropped_where_that_costs_less(tmp_path):
    found = of_features(adaptive=True, sparsity=5.0, learning_rate=1e-2)
    truth = torch.full((2, 3, 6, 6), IGNORED)
    with torch.no_grad():
        found.model.gate.contract.bias.fill_(1.0)
    assert found.model.eval()(CLIPS).kept.mean() > 0.9
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=60, enable_checkpointing=False)
    trainer.fit(found, DataLoader([(CLIPS, truth)] * 60, batch_size=None))
    kept = found.model.eval()(CLIPS).kept
    assert (kept.sum(-1) == 1).all()  # one is always left
    assert trainer.callback_metrics["train/sparsity"] < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 0.1}, "similarity: expected 0: the decoder predicts no transitions"),
        ({"sparsity": 0.1}, "sparsity: expected 0: the model drops no slots"),
        ({"reconstruction": 0.0}, "reconstruction: expected a weight above 0, of this or another loss"),
        ({"contrast": -1.0}, "contrast: expected a number of 0 or more"),
        ({"similarity_temperature": 0.0}, "similarity_temperature: expected a positive number"),
        ({"contrast_temperature": math.inf}, "contrast_temperature: expected a positive number"),
    ],
)
def test_losses_that_cannot_be_had_are_refused_before_training(options, message):
    with pytest.raises(InvalidArgument, match=message):
        task(**options)


def test_hints_need_masks(tmp_path):
    images, truth = data().loaded.held_out.batch(range(8))
    with pytest.raises(InvalidArgument, match="data: expected images with masks: the model's slots begin at the boxes"):
        small_trainer(tmp_path).validate(task("boxes"), one(images, torch.full_like(truth, IGNORED)), verbose=False)


def test_what_needs_masks_is_refused_before_training_where_there_are_none(tmp_path):
    write(tmp_path / "photos", [f"{number}.png" for number in range(6)])
    photos = ObjectDataModule(str(tmp_path / "photos"), image_size=16, batch_size=2)
    options = {"max_epochs": 1, "callbacks": [ModelCheckpoint(tmp_path, monitor="val/attention_fg_ari", mode="max")]}
    with pytest.raises(InvalidArgument, match=r"monitor: expected val/loss: .*photos has no masks to score with"):
        small_trainer(tmp_path, **options).fit(task(), photos)
    with pytest.raises(InvalidArgument, match="data: expected images with masks"):
        small_trainer(tmp_path, max_epochs=1).fit(task("boxes"), photos)
    small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(task(), photos)


def test_masks_are_resized_to_the_truth():
    masks, attention = pixel_masks(task().model(torch.randn(2, 3, 16, 16)), (20, 24))
    assert masks.shape == attention.shape == (2, 3, 20, 24)
    assert torch.allclose(attention.sum(1), torch.ones(2, 20, 24), atol=1e-5)
