"""What a model draws for a sample does not depend on the processes, nor on the rest of its batch."""

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.testing import assert_close

from narrows.layers.initial_slots import GaussianSlots
from narrows.layers.slot_gate import SlotGate
from narrows.layers.slot_preheat import SlotPreheat
from narrows.layers.slot_transition import SlotTransition
from narrows.layers.token_sampling import AdaptiveTokenSampler
from narrows.models import create_model
from narrows.models.sepvit import DropPath
from narrows.training.by_sample import DrawnBySample
from narrows.training.classification import Classification
from tests.training.small import SMALL, small_data, small_trainer

SCORES = torch.ones(12, 9)
FRAMES = torch.randn(1, 9, 3, 8, generator=torch.Generator().manual_seed(1))
SLOTS = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))  # of which one is the best by far
MODULES = {
    "slots": lambda: (GaussianSlots(3, 4), lambda module, rows: (module(len(rows)),)),
    "gumbel": lambda: (AdaptiveTokenSampler(4, sampling="gumbel"), lambda module, rows: module(SCORES[: len(rows)])),
    "gate": lambda: (SlotGate(8), lambda module, rows: (module(SLOTS.expand(len(rows), -1, -1), None, None),)),
    "preheat": lambda: (
        SlotPreheat(8),
        lambda module, rows: (
            module(torch.zeros(len(rows), 3, 8), torch.zeros(len(rows), 4, 8), None, None, None).start,
        ),
    ),
    "transition": lambda: (
        SlotTransition(8, 2, window=9, dropout=0.0),
        lambda module, rows: (
            module(FRAMES[:, :8].expand(len(rows), -1, -1, -1), FRAMES.expand(len(rows), -1, -1, -1), None, None).round(
                decimals=4
            ),
        ),
    ),
    "depth": lambda: (DropPath(0.5), lambda module, rows: (module(torch.ones(len(rows), 2)),)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_two_processes_draw_together_what_one_draws(kind):
    module, call = MODULES[kind]()
    drawn, found = DrawnBySample(module), {}
    for processes, process in ((1, 0), (2, 0), (2, 1)):
        batch = 12 // processes
        drawn.begin((7, 3), batch, process=process, processes=processes)
        found[processes, process] = call(module, range(batch)), call(module, range(batch))
    for whole, even, odd in zip(found[1, 0], found[2, 0], found[2, 1], strict=True):
        for all_rows, *parts in zip(whole, even, odd, strict=True):
            assert all(torch.equal(all_rows[start::2], part) for start, part in enumerate(parts))
    first, second = found[1, 0]
    assert not torch.equal(first[0], second[0]), "another call draws anew"
    drawn.begin((7, 4), 12, process=0, processes=1)
    assert not torch.equal(call(module, range(12))[0], first[0]), "another batch draws anew"
    drawn.remove()
    torch.manual_seed(0)
    without = call(module, range(12))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(without, call(module, range(12)), strict=True)), "torch's own again"


def test_initial_slots_are_normal_and_pass_gradients_on():
    module = GaussianSlots(8, 64)
    drawn = DrawnBySample(module)
    drawn.begin((1,), 200, process=0, processes=1)
    slots = module(200)
    noise = ((slots - module.mean) / module.log_scale.exp()).detach().flatten()
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert (noise.abs() < 1.96).float().mean() == pytest.approx(0.95, abs=0.005)
    slots.sum().backward()
    assert module.log_scale.grad is not None
    given = torch.randn(200, 8, 64)
    assert torch.equal(module(200, given), given), "slots that are given stay"
    drawn.remove()


def test_stochastic_depth_keeps_its_rate_and_is_silent_in_evaluation():
    module = DropPath(0.25)
    drawn = DrawnBySample(module)
    drawn.begin((1,), 4000, process=0, processes=1)
    branch = module(torch.ones(4000, 1))
    assert branch.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert branch.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(module.eval()(torch.ones(4000, 1)), torch.ones(4000, 1))
    drawn.remove()


@pytest.mark.parametrize("name", ["slot_vit_mini", "ats_vit_mini"])
def test_two_processes_train_and_validate_as_one_does(tmp_path, name):
    options = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2, "enable_checkpointing": False}
    further = {"sampling": "gumbel", "keep": [None, 8]} if name == "ats_vit_mini" else {}
    found = []
    for processes in (1, 2):
        seed_everything(1, verbose=False)
        task = Classification(create_model(name, **{**SMALL, "depth": 2}, **further))
        together = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
        trainer = small_trainer(tmp_path, precision="64-true", **options, **together)
        trainer.fit(task, small_data(batch_size=8 // processes))
        found.append((task.model.state_dict(), trainer.callback_metrics["val/loss"]))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.model.modules())
    (alone, loss), (shared, same_loss) = found
    for key, value in alone.items():
        assert_close(shared[key].double(), value.double(), rtol=0, atol=1e-6)
    assert_close(same_loss, loss, rtol=0, atol=1e-6)
