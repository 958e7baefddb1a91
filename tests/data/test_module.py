import pytest
import torch

from narrows.data import IGNORED, ImageDataModule
from narrows.data.module import ImagesOf, ObjectDataModule
from narrows.errors import DataError, InvalidArgument
from tests.data.folders import write_classes, write_image
from tests.data.object_folders import write, write_davis


def test_loaders_bring_whole_batches_in_an_order_of_the_seed(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 20})
    batches = [
        list(ImageDataModule(str(tmp_path), image_size=16, batch_size=8, seed=s).train_dataloader()) for s in (1, 1, 2)
    ]
    assert all(images.shape == (8, 3, 16, 16) and labels.shape == (8,) for images, labels in batches[0])
    for (images, labels), (again, labels_again) in zip(batches[0], batches[1], strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(batches[0][0][0], batches[2][0][0])


def test_workers_bring_the_same_images(tmp_path):
    write_classes(tmp_path, {"cat": 12, "dog": 12})
    alone, helped = (
        list(ImageDataModule(str(tmp_path), image_size=16, batch_size=4, num_workers=n).train_dataloader())
        for n in (0, 2)
    )
    for (images, labels), (again, labels_again) in zip(alone, helped, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_held_out_images_come_in_order_and_complete(tmp_path):
    data = ImageDataModule(str(write_classes(tmp_path, {"cat": 20, "dog": 20})), image_size=16, batch_size=3)
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(labels, data.loaded.held_out.batch(range(len(labels)))[1])
    assert len(labels) == len(data.loaded.held_out)


def test_predict_takes_any_images_in_the_form_the_model_was_trained_on(tmp_path):
    write_image(tmp_path / "deep" / "a.png", size=(50, 40))
    write_image(tmp_path / "b.jpg", size=(40, 50))
    data = ImageDataModule("digits", image_size=32, images=[str(tmp_path)])
    (images, labels), *rest = data.predict_dataloader()
    assert not rest
    assert images.shape == (2, 1, 32, 32)
    assert labels.tolist() == [-100, -100]
    assert data.to_predict.name(1).endswith("deep/a.png")
    assert ImageDataModule("digits").to_predict.name(3) == "scene 3"


def test_what_a_checkpoint_knows_of_the_images_spares_opening_them(tmp_path):
    image = write_image(tmp_path / "a.png", size=(50, 40))
    data = ImageDataModule("no/such/folder", images=[str(image)])
    data.trained_on = ImagesOf(num_classes=2, image_size=24, channels=3)
    ((images, _),) = data.predict_dataloader()
    assert images.shape == (1, 3, 24, 24)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(InvalidArgument, match="batch_size: expected a positive integer, got 0"):
        ImageDataModule(batch_size=0)
    data = ImageDataModule(str(write_classes(tmp_path, {"cat": 5, "dog": 5})))
    with pytest.raises(DataError, match=r"fewer than batch_size = 64. Lower batch_size or add images"):
        data.train_dataloader()


def test_objects_come_as_scenes_or_as_folders_of_images_and_of_clips(tmp_path):
    images, masks = next(iter(ObjectDataModule(length=32).train_dataloader()))
    assert images.shape == (16, 3, 32, 32)
    assert masks.amax() > 1
    clips, masks = next(iter(ObjectDataModule("moving_sprites", length=4, frames=2, batch_size=4).train_dataloader()))
    assert (clips.shape, masks.shape) == ((4, 2, 3, 32, 32), (4, 2, 32, 32))
    folder = str(write(tmp_path / "photos", [f"{name}.jpg" for name in range(20)]))
    images, masks = next(iter(ObjectDataModule(folder, image_size=16, batch_size=4).train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert (masks == IGNORED).all()
    folder = str(write_davis(tmp_path / "davis"))
    clips, masks = next(iter(ObjectDataModule(folder, image_size=16, frames=2, batch_size=1).train_dataloader()))
    assert (clips.shape, masks.shape) == ((1, 2, 3, 16, 16), (1, 2, 16, 16))
    with pytest.raises(InvalidArgument, match=r"expected one of sprites, .* a folder, or hf:<name>, got 'sprite'"):
        _ = ObjectDataModule("sprite").loaded
