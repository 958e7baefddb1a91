import pytest
import torch
from torch import nn

from narrows.models import create_model
from narrows.training.optimisation import parameter_groups, warmup_cosine


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


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (7, 0.5), (2, 0.1), (3, 0.0)])
def test_learning_rate_rises_linearly_to_its_highest_and_falls_to_nothing(total, warmup):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = warmup_cosine(optimizer, total_steps=total, warmup=warmup)
    rates = []
    for _ in range(total + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rising = max(1, round(warmup * total))
    assert rates[:rising] == pytest.approx([2.0 * (step + 1) / rising for step in range(rising)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert rates[total] == pytest.approx(0.0, abs=1e-12)
