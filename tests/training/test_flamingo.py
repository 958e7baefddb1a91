import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from narrows.adapters.flamingo import Flamingo
from narrows.data.documents import IMAGE, Document
from narrows.errors import InvalidArgument
from narrows.hub.readers import open_reader
from narrows.jobs.fit_flamingo import flamingo
from narrows.training.flamingo import FlamingoTraining, SaveReader, swapped, token_losses
from tests.hub.flamingo_parts import (
    FLAMINGO,
    TOKENIZER,
    open_gates,
    save_parts,
    small_data,
    small_encoder,
    small_language_model,
    small_task,
)
from tests.processes import run_processes
from tests.support import assert_close
from tests.training.small import small_trainer


def batch_of(count: int = 4) -> dict[str, torch.Tensor]:
    data = small_data(batch_size=count)
    return next(iter(data.val_dataloader()))


def test_the_loss_is_that_of_transformers():
    task, batch = open_gates(small_task()), batch_of()
    losses, counts = task.losses(batch)
    assert_close(losses.sum() / counts.sum(), task.model(**batch).loss)


def test_a_row_without_labels_has_a_loss_of_nothing():
    targets = torch.tensor([[2, 3], [-100, -100]])
    losses, counts = token_losses(torch.randn(2, 2, 5), targets, torch.ones(2, 2))
    assert counts.tolist() == [2, 0]
    assert losses[1] == 0


def test_only_what_was_added_trains(tmp_path):
    task, data = small_task(), small_data()
    before = copy.deepcopy(task.model.state_dict())
    small_trainer(tmp_path, limit_train_batches=8, max_epochs=1, enable_checkpointing=False).fit(task, data)
    changed = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("resampler.", "blocks.")) for name in changed)
    assert {name for name, p in task.model.named_parameters() if p.requires_grad} >= changed
    assert any(name.startswith("resampler.latents") for name in changed)  # the gates have opened


def test_the_resampler_and_gates_and_norms_have_no_weight_decay(tmp_path):
    task = small_task()
    small_trainer(tmp_path, max_epochs=1, limit_train_batches=1, enable_checkpointing=False).fit(task, small_data())
    decayed = {id(p) for group in task.optimizers().param_groups if group["weight_decay"] for p in group["params"]}
    trained = {id(p) for group in task.optimizers().param_groups for p in group["params"]}
    named = dict(task.flamingo.named_parameters())
    assert {name for name, p in named.items() if id(p) in decayed} == {
        name for name in named if name.startswith("blocks.") and named[name].ndim == 2
    }
    assert trained == {id(p) for p in named.values() if p.requires_grad}


def test_every_trained_parameter_takes_part_in_a_batch_without_images():
    """As DDP and FSDP demand."""
    task = open_gates(small_task()).train()
    collate = small_data().collate
    batch = collate([Document("one and two are digits", torch.zeros(0, 1, 16, 16))] * 2)
    losses, _ = task.losses(batch)
    losses.sum().backward()
    assert all(p.grad is not None for p in task.flamingo.parameters() if p.requires_grad)


def test_images_change_places_with_images_alone():
    media, mask = torch.arange(6.0).view(3, 2, 1), torch.tensor([[True, False], [True, True], [False, False]])
    assert swapped(media, mask).flatten().tolist() == [3, 1, 0, 2, 4, 5]


def test_one_image_in_a_batch_is_compared_with_that_of_the_batch_before():
    torch.manual_seed(0)
    task, collate = open_gates(small_task()).eval(), small_data().collate
    batches = [collate([Document(f"{IMAGE}one", torch.rand(1, 1, 16, 16))]) for _ in range(2)]
    with torch.no_grad():
        task.validation_step(batches[0], 0)
        assert task.loss_compared.weight == 0  # there was no other image yet
        task.validation_step(batches[1], 1)
        other = {**batches[1], "media": batches[0]["media"]}
        right, wrong = (task.losses(batch) for batch in (batches[1], other))
    assert task.loss_compared.compute() == pytest.approx((right[0] / right[1]).item())
    assert task.loss_swapped.compute() == pytest.approx((wrong[0] / wrong[1]).item())
    assert task.loss_swapped.compute() != task.loss_compared.compute()


def test_what_is_logged_tells_whether_images_are_used(tmp_path):
    task, data = open_gates(small_task()), small_data(batch_size=8)
    (logged,) = small_trainer(tmp_path, limit_val_batches=2).validate(task, data, verbose=False)
    loader = iter(data.val_dataloader())
    sums, counts = torch.zeros(2), 0
    with torch.no_grad():
        for batch in (next(loader), next(loader)):
            other = {**batch, "media": swapped(batch["media"], batch["media_mask"])}
            for index, one in enumerate((batch, other)):
                logits = task.eval()(one)[:, :-1].flatten(0, 1)
                sums[index] += F.cross_entropy(logits, one["labels"][:, 1:].flatten(), reduction="sum")
            counts += (batch["labels"][:, 1:] != -100).sum()
    assert logged["val/loss"] == pytest.approx((sums[0] / counts).item(), rel=1e-5)
    assert logged["val/loss_swapped"] == pytest.approx((sums[1] / counts).item(), rel=1e-5)
    assert logged["val/image_gain"] == pytest.approx(((sums[1] - sums[0]) / counts).item(), abs=1e-5)
    assert logged["val/image_gain"] != 0


def test_with_closed_gates_images_make_no_difference(tmp_path):
    (logged,) = small_trainer(tmp_path).validate(small_task(), small_data(), verbose=False)
    assert logged["val/image_gain"] == 0
    assert not any(small_task().gates().values())


def test_every_gate_is_logged(tmp_path):
    task = open_gates(small_task())
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=1, enable_checkpointing=False)
    trainer.fit(task, small_data())
    gates = {name for name in trainer.logged_metrics if name.startswith("gate/")}
    assert gates == {f"gate/{layer}.{part}" for layer in (0, 1) for part in ("attn", "ff")}
    assert task.gates()["gate/1.attn"] == pytest.approx(math.tanh(0.8), abs=0.02)


def test_checkpoints_hold_what_was_added_and_resume_exactly(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("crash")

    torch.manual_seed(0)
    unbroken = open_gates(small_task())
    start = copy.deepcopy(unbroken.state_dict())
    small_trainer(tmp_path, enable_checkpointing=False).fit(unbroken, small_data())

    broken = small_task()
    broken.load_state_dict(start)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="crash"):
        small_trainer(tmp_path, callbacks=[keep, Stop()]).fit(broken, small_data())
    kept = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert kept
    assert all(name.startswith(("model.resampler.", "model.blocks.")) for name in kept)

    resumed = small_task()
    resumed.load_state_dict({name: value for name, value in start.items() if name not in kept}, strict=False)
    trainer = small_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(resumed, small_data(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = open_gates(small_task()).train()
    again = open_gates(small_task(gradient_checkpointing=True)).train()
    again.load_state_dict(plain.state_dict())
    batch, gradients = batch_of(), []
    for task in (plain, again):
        loss, _ = task.losses(batch)
        loss.sum().backward()
        gradients.append({n: p.grad for n, p in task.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_two_processes_give_what_one_gives(tmp_path):
    torch.manual_seed(0)
    alone = open_gates(small_task())
    start = copy.deepcopy(alone.state_dict())
    few = {"max_epochs": 1, "limit_train_batches": 4, "enable_checkpointing": False, "precision": "64-true"}
    # In each step as many tokens in either process, so that the mean of means is the mean.
    small_trainer(tmp_path / "1", **few).fit(alone, even(small_data(batch_size=4)))
    together = small_task()
    together.load_state_dict(start)
    small_trainer(tmp_path / "2", devices=2, strategy="ddp_fork", **few).fit(together, even(small_data(batch_size=2)))
    for name, value in alone.model.state_dict().items():
        assert_close(together.model.state_dict()[name], value, 1e-7)


def even(data):
    """Every document with the same text: its images alone differ."""
    documents = data.loaded.train.documents

    def same(indices, epoch=0):
        found = documents(indices, epoch)
        texts = "<image>the first image shows a two<|endofchunk|>"
        return [type(one)(texts, one.images[:1]) for one in found]

    data.loaded.train.documents = same
    return data


def test_sharded_parameters_give_what_whole_ones_give_and_are_saved_whole(tmp_path):
    torch.manual_seed(0)
    task = open_gates(small_task())
    few = {"max_epochs": 1, "enable_checkpointing": False}
    small_trainer(tmp_path, **few).fit(task, even(small_data(batch_size=8)))
    from tests.training import sharded_flamingo  # which takes `even` from here

    assert run_processes(tmp_path, lambda _: sharded_flamingo.main(tmp_path / "sharded")) == [0, 0]
    language_model = task.flamingo.remove()
    saved = Flamingo.from_pretrained(
        str(tmp_path / "sharded" / "model"), language_model=language_model, vision_encoder=small_encoder()
    )
    for name, value in task.flamingo.state_dict().items():
        if name.startswith(("resampler.", "blocks.")):
            assert_close(saved.state_dict()[name], value, 1e-5)


def test_the_best_state_is_saved_for_generate(tmp_path):
    language_model, encoder = save_parts(tmp_path)
    task = flamingo(language_model, encoder, flamingo=FLAMINGO, learning_rate=1e-2, warmup_steps=1)
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", mode="max")  # the worst, so that it is not the last
    logger = CSVLogger(tmp_path, name="", version="")
    data = small_data(tokenizer=task.tokenizer)
    small_trainer(tmp_path, max_epochs=3, callbacks=[best, SaveReader()], logger=logger).fit(task, data)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    train, held_out = len(data.loaded.train), len(data.loaded.held_out)
    assert f"| Data | digits: {train:,} training and {held_out:,} held-out documents |" in card
    assert f"| Held-out loss | {best.best_model_score.item():.4g} |" in card
    assert "\n# model\n" in card
    kept = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    reader = open_reader(language_model, tmp_path / "model")
    for name, value in kept.items():
        assert torch.equal(reader.model.state_dict()[name.removeprefix("model.")], value)


def test_rows_of_new_tokens_train_alone_and_are_saved(tmp_path):
    language_model, encoder = save_parts(tmp_path)
    new = ("<image>", "<|endofchunk|>")
    task = flamingo(language_model, encoder, flamingo=FLAMINGO, learning_rate=1e-2, warmup_steps=1, new_tokens=new)
    before = copy.deepcopy(task.flamingo.language_model.state_dict())
    logger = CSVLogger(tmp_path, name="", version="")
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/loss")
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[best, SaveReader()], logger=logger)
    trainer.fit(task, small_data(tokenizer=task.tokenizer))
    ids = task.tokenizer.convert_tokens_to_ids(list(new))
    for name, value in task.flamingo.language_model.state_dict().items():
        changed = (value != before[name]).flatten(1).any(1).nonzero().flatten().tolist() if value.ndim > 1 else []
        assert changed == (ids if name in ("model.embed_tokens.weight", "lm_head.weight") else []), name
    reader = open_reader(language_model, tmp_path / "model")
    for name, value in task.flamingo.language_model.state_dict().items():
        assert torch.equal(reader.model.language_model.state_dict()[name], value)


def test_bad_input_is_explained():
    for options, message in (
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"new_tokens": ["<video>"]}, "new_tokens: expected tokens of the tokenizer, with rows in the language"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            small_task(**options)
        assert message in str(raised.value)
    blind = Flamingo(small_language_model(), media_dim=16, **FLAMINGO)
    with pytest.raises(InvalidArgument, match="flamingo: expected one with a vision encoder"):
        FlamingoTraining(blind, TOKENIZER)


@pytest.mark.parametrize("used", [False, True])
def test_images_that_are_not_used_are_reported(tmp_path, monkeypatch, caplog, used):
    """With closed gates that learn nothing they are not."""
    task, losses = small_task(look_every=1, learning_rate=1e-9), FlamingoTraining.losses

    def worse_with_others(self, batch):
        found, weights = losses(self, batch)
        return found * (1 if torch.is_grad_enabled() else 1.1), weights

    if used:
        monkeypatch.setattr(FlamingoTraining, "losses", worse_with_others)
    logger = CSVLogger(tmp_path)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=8, limit_val_batches=0, logger=logger)
    trainer.fit(task, small_data(batch_size=8))
    said = [record.getMessage() for record in caplog.records if "images are not used" in record.getMessage()]
    assert len(said) == int(not used)
    assert ("gate_init: 0.4" in "".join(said)) == (not used)
    assert (trainer.logged_metrics["train/image_gain"] > 0.1) == used


def test_weights_of_the_data_are_those_of_the_loss():
    task, batch = open_gates(small_task()), batch_of()
    weights = torch.rand(batch["labels"].shape)
    losses, totals = task.losses({**batch, "weights": weights})
    targets, counted = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    each = F.cross_entropy(task(batch)[:, :-1].transpose(1, 2), targets, reduction="none")
    assert_close(losses, (each * weights[:, 1:] * counted).sum(1))
    assert_close(totals, (weights[:, 1:] * counted).sum(1))


def test_logits_are_computed_where_a_label_is_and_nowhere_else():
    task, batch = open_gates(small_task()), batch_of()
    batch["labels"][:, :-4] = -100
    seen = []
    head = task.flamingo.language_model.lm_head
    handle = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    losses, _ = task.losses(batch)
    task._keeps = False
    everywhere, _ = task.losses(batch)
    handle.remove()
    assert seen == [4, batch["labels"].shape[1]]
    assert_close(losses, everywhere)
