import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from narrows.training.classification import Classification
from tests.training.small import small_data, small_trainer


def _task() -> Classification:
    """A model that draws random numbers in every step."""
    torch.manual_seed(0)
    return Classification(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10)))


def test_what_is_random_in_a_step_is_the_same_after_resuming(tmp_path):
    unbroken = _task()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    small_trainer(tmp_path, callbacks=[keep]).fit(unbroken, small_data())
    resumed = _task()
    torch.randn(7)
    small_trainer(tmp_path, enable_checkpointing=False).fit(
        resumed, small_data(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
    )
    assert torch.equal(resumed.model[2].weight, unbroken.model[2].weight)


def test_every_step_draws_its_own_numbers_and_another_seed_others(tmp_path):
    drawn = []

    class Draws(Classification):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            super().on_train_batch_start(batch, batch_idx)
            drawn.append(torch.rand(()).item())

    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        task = Draws(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)))
        small_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(task, small_data())
    first, again, other = drawn[:3], drawn[3:6], drawn[6:]
    assert len(set(first)) == 3
    assert again == first
    assert not set(other) & set(first)
