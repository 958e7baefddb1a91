import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from narrows.models import create_model
from narrows.training.classification import Classification
from narrows.training.task import parameter_groups, warmup_schedule
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


def test_biases_norms_and_what_the_model_names_do_not_decay():
    model = create_model("vit_mini")
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in decayed} | {names[p] for p in kept} == set(names.values())
    assert len(decayed) + len(kept) == len(names)
    assert "embedding.positions" in {names[p] for p in kept}
    assert all(p.ndim > 1 and not names[p].endswith("bias") for p in decayed)
    assert all(p.ndim == 1 or names[p] in model.no_weight_decay() for p in kept)


def test_stacked_biases_of_experts_do_not_decay():
    model = nn.Module()
    model.weight, model.bias, model.hidden_bias = (nn.Parameter(torch.ones(4, 3)) for _ in range(3))
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    assert decayed == [model.weight]
    assert len(kept) == 2


def test_decay_shrinks_weights_and_leaves_biases():
    model = nn.Linear(3, 3)
    before = model.bias.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    weight = model.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, weight * 0.95)
    assert torch.equal(model.bias, before)


def _rates(peak: float, steps: int, **schedule) -> list[float]:
    """The learning rate in each of so many steps, and after the last."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=peak)
    scheduler, rates = warmup_schedule(optimizer, **schedule), []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("total", "rising"), [(100, 10), (7, 4), (2, 1), (3, 1), (1, 1)])
def test_the_learning_rate_rises_linearly_to_its_peak_and_falls_to_nothing(total, rising):
    rates = _rates(2.0, total, warmup_steps=rising, total_steps=total)
    assert rates[:rising] == pytest.approx([2.0 * (step + 1) / rising for step in range(rising)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert rates[total] == pytest.approx(0.0 if total > rising else 2.0, abs=1e-12)


def test_the_learning_rate_rises_and_stays_or_falls():
    stays = _rates(1.0, 100, warmup_steps=4)
    assert stays == pytest.approx([0.25, 0.5, 0.75, *([1.0] * 98)])
    falls = _rates(1.0, 24, warmup_steps=4, total_steps=24)
    assert falls[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert (falls[14], falls[24]) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert _rates(1.0, 30, warmup_steps=4, total_steps=24)[-1] == pytest.approx(0.0, abs=1e-12)
    assert _rates(1.0, 3, warmup_steps=0) == [1.0] * 4
    assert _rates(1.0, 4, warmup_steps=0, total_steps=4)[::2] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("warmup_steps", [1, 3])
def test_the_schedule_gives_what_torchs_own_give(warmup_steps):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    rising = LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1)
    falling = CosineAnnealingLR(optimizer, 12 - warmup_steps)
    theirs, rates = SequentialLR(optimizer, [rising, falling], milestones=[warmup_steps]), []
    for _ in range(13):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert _rates(1.0, 12, warmup_steps=warmup_steps, total_steps=12) == pytest.approx(rates, abs=1e-12)


def test_a_finished_run_that_goes_on_for_longer_follows_the_longer_schedule(tmp_path):
    trainer = small_trainer(tmp_path, max_epochs=1)
    trainer.fit(_task(), small_data())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    rates = []

    class Rates(Classification):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            super().on_train_batch_start(batch, batch_idx)
            rates.append(self.optimizers().param_groups[0]["lr"])

    longer = Rates(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10)))
    small_trainer(tmp_path, max_epochs=4, enable_checkpointing=False).fit(
        longer, small_data(), ckpt_path=tmp_path / "finished.ckpt", weights_only=True
    )
    whole = _rates(longer.learning_rate, 12, warmup_steps=1, total_steps=12)
    assert rates[0] == 0  # as the finished run left it
    assert rates[1:] == pytest.approx(whole[4:12])
