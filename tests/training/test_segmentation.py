import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from narrows.data.module import SegmentationDataModule
from narrows.models.segmenter import Segmenter
from narrows.training.segmentation import Segmentation
from tests.support import assert_close
from tests.training.small import small_trainer

BACKBONE = {"dims": [8, 16], "depths": [1, 1], "heads": [1, 2], "window_size": 4}


def _task(**kwargs) -> Segmentation:
    args = {"image_size": 32, **BACKBONE}
    segmenter = Segmenter("sepvit_lite", num_classes=11, channels=1, dim=16, backbone_args=args)
    return Segmentation(segmenter, **kwargs)


def _data(**kwargs) -> SegmentationDataModule:
    return SegmentationDataModule(image_size=32, **{"batch_size": 8, **kwargs})


def test_training_learns_what_it_sees(tmp_path):
    task, data = _task(learning_rate=1e-2), _data()
    images, classes = data.loaded.train.batch(range(8))
    batches = DataLoader([(images, classes)] * 200, batch_size=None)
    small_trainer(tmp_path, max_epochs=1, limit_train_batches=200, enable_checkpointing=False).fit(task, batches)
    shares = classes.flatten().bincount() / classes.numel()
    knowing_shares = torch.special.entr(shares).sum()  # the loss of whoever has not looked at the images
    assert F.cross_entropy(task(images), classes) < 0.5 * knowing_shares


def test_logged_are_the_loss_and_the_mean_iou_of_all_held_out_pixels(tmp_path):
    torch.manual_seed(1)
    task, data = _task(), _data(batch_size=20)
    data.loaded.held_out._length = 50
    (logged,) = small_trainer(tmp_path, limit_val_batches=1.0).validate(task, data, verbose=False)
    images, classes = data.loaded.held_out.batch(range(50))
    with torch.no_grad():
        logits = task.eval()(images)
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-5)
    found = F.one_hot(logits.argmax(1), 11).bool(), F.one_hot(classes, 11).bool()
    both, either = (found[0] & found[1]).sum((0, 1, 2)), (found[0] | found[1]).sum((0, 1, 2))
    assert (either > 0).all()
    assert logged["val/mean_iou"] == pytest.approx((both / either).mean().item(), rel=1e-5)


def test_images_that_do_not_count_change_neither_loss_nor_mean_iou(tmp_path):
    task = _task()
    images, classes = _data().loaded.held_out.batch(range(8))
    filled = torch.cat((classes[:5], torch.full_like(classes[5:], -100)))
    trainer = small_trainer(tmp_path, limit_val_batches=1.0)

    def one(*batch: torch.Tensor) -> DataLoader:
        return DataLoader([batch], batch_size=None)

    (counted,) = trainer.validate(task, one(images[:5], classes[:5]), verbose=False)
    (ignored,) = trainer.validate(task, one(images, filled), verbose=False)
    assert ignored == pytest.approx(counted)


def test_predictions_are_classes(tmp_path):
    task, data = _task(), _data()
    first, *_ = small_trainer(tmp_path, limit_predict_batches=2).predict(task, data)
    with torch.no_grad():
        assert torch.equal(first, task.eval()(data.loaded.held_out.batch(range(8))[0]).argmax(1))


def test_a_module_can_be_trained_as_it_is(tmp_path):
    model = nn.Conv2d(1, 11, 3, padding=1)
    before = model.weight.detach().clone()
    task = Segmentation(model)
    small_trainer(tmp_path, enable_checkpointing=False).fit(task, _data())
    assert task.model is model
    assert not torch.equal(model.weight, before)


def test_a_checkpoint_holds_nothing_but_plain_data_and_opens_again(tmp_path):
    task, trainer = _task(), small_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, _data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Segmentation.load_from_checkpoint(tmp_path / "a.ckpt", model=_task().model, weights_only=True)
    images, _ = _data().loaded.held_out.batch([0])
    assert_close(again.eval()(images), task.eval()(images), 0.0)
