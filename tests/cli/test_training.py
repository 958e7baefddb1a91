import csv
import json
import re
import shutil
import signal
import warnings

import pytest
import torch
import yaml
from jsonargparse._deprecated import JsonargparseDeprecationWarning

from narrows.cli import main, shorthand
from narrows.cli.training import OPTIONS
from narrows.data import ImageDataModule
from narrows.models import load_model
from narrows.training.classification import Classification
from tests.data.folders import write_classes, write_image

MODEL = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"), {"cat": 16, "dog": 16})


@pytest.fixture
def narrows(tmp_path, monkeypatch, folder):
    """Runs a command of the trainer on the small folder in an empty place."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *options: str) -> int:
        data = ["--data", str(folder), "--data.image-size", "16", "--data.batch_size", "8"]
        return main([command, *data, "--model.model_args", json.dumps(MODEL), *QUIET, *options])

    yield call
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _only(found):
    (path,) = found
    return path


def test_a_checkpoint_of_another_task_is_named(narrows, tmp_path, capsys):
    torch.save({OPTIONS: {"model": {"model": "vit_mini", "num_classes": 2}, "data": {}}}, tmp_path / "other.ckpt")
    assert main(["validate", "--task", "objects", "--ckpt_path", "other.ckpt", *QUIET]) == 1
    expected = "checkpoint: expected a checkpoint of objects, got one of another task, whose model has num_classes."
    assert expected in capsys.readouterr().err


def test_fit_uses_nothing_of_jsonargparse_that_is_deprecated(narrows, monkeypatch):
    monkeypatch.setattr("jsonargparse._deprecated.shown_deprecation_warnings", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", JsonargparseDeprecationWarning)
        assert narrows("fit", "--trainer.max_epochs", "1") == 0


def test_fit_leaves_a_run_that_every_other_command_takes(narrows, tmp_path, capsys):
    assert narrows("fit", "--trainer.max_epochs", "2") == 0
    run = _only((tmp_path / "runs").iterdir())
    assert f"Checkpoints, metrics and the model are in runs/{run.name}" in capsys.readouterr().out
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents*"))
    with (run / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert {"val/accuracy", "val/loss", "train/accuracy"} <= set(logged[0])
    model = load_model(run / "model")
    assert model.head.out_features == 2
    last = run / "checkpoints" / "last.ckpt"

    given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(last)]
    for command in ("validate", "test"):
        assert main([command, *given]) == 0
    assert main(["predict", *given]) == 0
    table = _only((tmp_path / "runs").glob("*/predictions.csv"))
    assert f"Predictions are in {table.relative_to(tmp_path)}" in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)

    new = write_image(tmp_path / "new" / "x.jpg", size=(50, 30))
    assert main(["predict", *given, "--data.images", f"[{new}]", "--trainer.default_root_dir", "elsewhere"]) == 0
    with _only((tmp_path / "elsewhere").glob("*/predictions.csv")).open() as file:
        (row,) = csv.DictReader(file)
    assert row["image"] == str(new)


def test_fit_resumes_exactly(narrows, tmp_path):
    torch.manual_seed(0)
    assert narrows("fit", "--trainer.max_epochs", "4", "--checkpoint.save_top_k=-1", "--checkpoint.monitor=null") == 0
    run = _only((tmp_path / "runs").iterdir())
    half = _only((run / "checkpoints").glob("epoch=1-*.ckpt"))
    resume = ["--config", str(run / "config.yaml"), "--ckpt_path", str(half), "--trainer.default_root_dir", "again"]
    assert main(["fit", *resume]) == 0
    again = _only((tmp_path / "again").iterdir())
    expected, found = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, again))
    assert expected["global_step"] == found["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


def test_options_that_all_commands_share_have_one_spelling(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["fit", "--data", str(folder), "--epochs=1", "--batch-size", "8", "--image_size", "16", "--device", "cpu"]
    line += ["--learning-rate", "0.01", "--seed", "3", "--output", "here", "--model.betas", "0.9,0.95"]
    assert main([*line, "--model.model_args", json.dumps(MODEL)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^Best held-out accuracy: \d+\.\d %$", printed.out, re.MULTILINE)
    assert re.search(r"^training: \d+/\d+ steps, \d+ s, held-out \d+\.\d %$", printed.err, re.MULTILINE)
    assert not re.search(r"[\r\x1b]", printed.out + printed.err)
    for noise in ("GPU available", "Tip", "dirpath", "max_epochs", "site-packages", "Restoring"):
        assert noise not in printed.out + printed.err
    run = _only((tmp_path / "here").iterdir())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1
    assert config["seed_everything"] == 3
    assert config["model"]["betas"] == [0.9, 0.95]
    assert (config["model"]["learning_rate"], config["data"]["batch_size"]) == (0.01, 8)

    assert main(["test", "--checkpoint", str(run), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"test loss: [\d.]+\ntest accuracy: \d+\.\d %\n", printed.out)
    assert printed.err == ""
    assert main(["validate", "--checkpoint", str(run), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert set(metrics) == {"val/loss", "val/accuracy"}

    pictures = ",".join(str(folder / name) for name in ("cat", "dog"))
    assert main(["predict", "--checkpoint", str(run), "--images", pictures, "--json", "--output", "there"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["predictions"]) == 32
    assert {row["class"] for row in found["predictions"]} <= {"cat", "dog"}
    assert all(0.5 <= row["probability"] <= 1 for row in found["predictions"])
    assert main(["predict", "--checkpoint", str(run), "photos"]) == 2
    assert "Did you mean --images photos?" in capsys.readouterr().err
    for command, wanted in (("fit", "last.ckpt"), ("test", "epoch=0")):
        assert wanted in shorthand.short_forms([command, "--checkpoint", str(run)])[-1]
        assert wanted in shorthand.short_forms([command, f"--checkpoint={run}"])[-1]


def test_a_checkpoint_says_what_its_task_is(tmp_path):
    torch.save({shorthand.TASK: "segmentation"}, tmp_path / "a.ckpt")
    torch.save({}, tmp_path / "old.ckpt")
    tasks = ("classification", "segmentation")
    assert shorthand.task_of(["predict", "--ckpt_path", str(tmp_path / "a.ckpt")], tasks) == "segmentation"
    assert shorthand.task_of(["predict", f"--ckpt_path={tmp_path / 'old.ckpt'}"], tasks) == "classification"
    given = ["predict", "--task", "classification", "--ckpt_path", str(tmp_path / "a.ckpt")]
    assert shorthand.task_of(given, tasks) == "classification", "what is given goes before"


def test_fit_honours_the_loggers_and_folders_of_lightning(narrows, tmp_path):
    assert narrows("fit", "--trainer.max_epochs=1", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine") == 0
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(narrows, tmp_path, capsys, monkeypatch):
    def stop(task, *_):
        if task.trainer.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Classification, "on_train_batch_start", stop)
    assert narrows("fit", "--trainer.max_epochs", "4") == 130
    last = _only((tmp_path / "runs").glob("*/checkpoints/last.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] == 4
    printed = capsys.readouterr().err
    advice = printed[printed.index("Go on with: narrows ") :].split()[4:]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(advice) == 0
    assert len(list((tmp_path / "runs").glob("*/model/model.safetensors"))) == 1


def test_the_configuration_can_be_printed_and_read_again(narrows, tmp_path, capsys):
    assert narrows("fit", "--trainer.max_epochs", "1", "--print_config") == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config", "recipe.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--trainer.max_epoch 1", 2, "Did you mean --trainer.max_epochs?"),
        ("--data.btach_size 4", 2, "Did you mean --data.batch_size?"),
        ("--model.learn_rate 0.1", 2, "Did you mean --model.learning_rate?"),
        ("--lr 0.1", 2, "Did you mean --learning_rate?"),
        ("--bs 4", 2, "Did you mean --batch_size?"),
        ("--wd 0.1", 2, "Did you mean --model.weight_decay?"),
        ("--epoch 3", 2, "Did you mean --epochs?"),
        ("photos", 2, "Did you mean --data photos?"),
        ("timm:vit_tiny", 2, "Did you mean --model timm:vit_tiny?"),
        ("--device tpu", 1, "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'tpu'"),
        ("--device cpu --trainer.accelerator gpu", 1, "trainer.accelerator: expected to be left out where --device is"),
        ("--model.betas 0.9,much", 2, "betas"),
        ("--trainer.max_epochs abc", 2, 'Parser key "trainer.max_epochs"'),
        ("--config nope.yaml", 2, "nope.yaml"),
        ("--ckpt_path nope.ckpt", 1, "checkpoint: expected a checkpoint file, got 'nope.ckpt', which does not exist"),
        ("--model vit_mni", 1, "Did you mean 'vit_mini'?"),
        ('--model.model_args {"depht":2}', 1, "Did you mean 'depth'?"),
        ("--data no/such/folder", 1, "data: expected 'digits' or a folder"),
        ("--data.batch_size 0", 1, "batch_size: expected a positive integer, got 0"),
        ("--data.batch_size 500", 1, "fewer than batch_size = 500. Lower batch_size or add images"),
    ],
)
def test_bad_input_is_explained(narrows, options, code, message, capsys):
    assert narrows("fit", *options.split()) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_only_training_can_do_without_a_checkpoint(narrows, command, capsys):
    assert narrows(command) == 1
    assert "checkpoint: expected the checkpoint to look at, got None. Add --checkpoint <run>" in capsys.readouterr().err


def test_an_unknown_key_of_a_recipe_is_told_the_nearest(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("data:\n  image_siez: 32\n")
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "Did you mean --data.image_size?" in capsys.readouterr().err


def test_every_training_command_explains_itself(capsys):
    for command, first in shorthand.FIRST.items():
        assert main([command, "--help"]) == 0
        brief = capsys.readouterr().out
        assert len(brief.splitlines()) <= 40, "it fits a screen"
        assert max(map(len, brief.splitlines())) <= 80
        assert all(f"--{name} " in brief for name in first)
        assert "--help-all" in brief
        assert "type:" not in brief
        assert main([command, "--help-all"]) == 0
        assert "--data.batch_size" in capsys.readouterr().out


def test_a_checkpoint_brings_its_settings_and_refuses_others(narrows, tmp_path, capsys):
    assert narrows("fit", "--trainer.max_epochs", "1", "--model.learning_rate", "0.01") == 0
    last = str(_only((tmp_path / "runs").glob("*/checkpoints/last.ckpt")))
    assert main(["fit", *QUIET, "--ckpt_path", last, "--model.learning_rate", "0.5"]) == 1
    printed = capsys.readouterr().err
    assert "model.learning_rate: expected 0.01, with which the checkpoint was trained, got 0.5. Leave it out" in printed
    assert main(["fit", *QUIET, "--ckpt_path", last, "--model", "sepvit_mini"]) == 1
    assert "model.model: expected 'vit_mini', with which the checkpoint was trained" in capsys.readouterr().err
    assert main(["test", *QUIET, "--ckpt_path", last, "--data", "digits"]) == 1
    assert "data: expected the 2 classes that the model was trained on, 'cat', 'dog' among" in capsys.readouterr().err
    assert main(["test", *QUIET, "--ckpt_path", last, "--data.image_size", "32"]) == 1
    assert "checkpoint: expected a checkpoint of this model, got one with other model." in capsys.readouterr().err
    assert main(["test", *QUIET, "--ckpt_path", last]) == 0, "model and data are those of the checkpoint"
    torch.save({"state_dict": {}}, tmp_path / "half.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "half.ckpt").read_bytes()[:300])
    assert main(["test", *QUIET, "--ckpt_path", "half.ckpt"]) == 1
    assert "checkpoint: expected a checkpoint that narrows fit wrote, got 'half.ckpt'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_keeps_a_checkpoint_and_its_number(narrows, tmp_path, capsys, monkeypatch, number, code):
    def stop(task, *_):
        if task.trainer.global_step == 1:
            signal.raise_signal(number)

    monkeypatch.setattr(Classification, "on_train_batch_start", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert narrows("fit", "--trainer.max_epochs", "4") == code
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped. Go on with: narrows fit --config runs/" in capsys.readouterr().err
    last = _only((tmp_path / "runs").glob("*/checkpoints/last.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] == 2


def test_a_run_that_diverges_says_so_and_leaves_no_model(narrows, tmp_path, capsys):
    assert narrows("fit", "--trainer.max_epochs", "4", "--model.learning_rate", "1e30") == 1
    assert "narrows: The training diverged: after" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/model"))


@pytest.mark.parametrize(
    "named", ["callbacks: {class_path: hostile.Thing}", "callbacks: [hostile.Thing]", "logger: hostile.T"]
)
def test_a_configuration_imports_nothing_but_what_is_listed(narrows, tmp_path, monkeypatch, capsys, named):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text("import pathlib\npathlib.Path('it_ran').touch()\n")
    (tmp_path / "config.yaml").write_text(f"trainer: {{{named}}}\n")
    assert narrows("fit", "--config", "config.yaml") == 2
    assert not (tmp_path / "it_ran").exists()
    printed = capsys.readouterr().err
    assert "a configuration may not import hostile." in printed
    assert "NARROWS_IMPORTS=hostile" in printed


def test_an_own_package_is_imported_where_the_environment_names_it(narrows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NARROWS_IMPORTS", "mine, other")
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass Loud(Callback):\n"
        "    def on_fit_start(self, trainer, pl_module):\n        raise SystemExit(7)\n"
    )
    (tmp_path / "config.yaml").write_text("trainer: {callbacks: [mine.Loud], fast_dev_run: true}\n")
    assert narrows("fit", "--config", "config.yaml") == 7


def test_a_damaged_configuration_or_checkpoint_is_told_in_a_line(narrows, tmp_path, capsys):
    whole = b"trainer:\n  max_epochs: 0\nmodel:\n  learning_rate: 0.001\n  dropout: 0.0\n"
    for number, damaged in enumerate(
        [whole[:18], whole[:12] + b"\xff\xfe" + whole[12:], whole.replace(b":", b"", 1), b"[" * 3000, b"&a [*a]", b"\0"]
    ):
        (tmp_path / "config.yaml").write_bytes(damaged)
        assert narrows("fit", "--config", "config.yaml", "--print_config") in (1, 2), number
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        assert len(printed) < 2000
    torch.save({"state_dict": {"a": torch.zeros(500)}}, tmp_path / "last.ckpt")
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    assert narrows("fit", "--ckpt_path", "last.ckpt") == 1
    assert (
        "checkpoint: expected a checkpoint that narrows fit wrote, got 'last.ckpt': Bad CRC" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """A run on the small folder: its folder."""
    runs = tmp_path_factory.mktemp("trained")
    options = ["--data", str(folder), "--data.image_size=16", "--data.batch_size=8", "--trainer.max_epochs=1", *QUIET]
    options += ["--model.model_args", json.dumps(MODEL), "--trainer.default_root_dir", str(runs)]
    assert main(["fit", *options]) == 0
    return _only(runs.iterdir())


def test_predict_opens_no_training_data_and_names_the_classes(trained, folder, tmp_path, monkeypatch):
    image = write_image(tmp_path / "x.jpg", size=(50, 30))
    shutil.copytree(trained, tmp_path / "run")
    assert load_model(tmp_path / "run" / "model").classes == ("cat", "dog")
    monkeypatch.setattr(ImageDataModule, "loaded", property(lambda self: pytest.fail("training data were opened")))
    given = ["--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "--data.images", f"[{image}]", *QUIET]
    for extra in ([], ["--data", "no/such/folder"], ["--data", str(folder)]):
        assert main(["predict", *given, *extra, "--trainer.default_root_dir", str(tmp_path / "new")]) == 0
    tables = list((tmp_path / "new").glob("*/predictions.csv"))
    assert len(tables) == 3
    with tables[0].open() as file:
        (row,) = csv.DictReader(file)
    assert row["class"] in ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "expected", "got"),
    [
        (
            ["cat", "puma"],
            "expected the 2 classes that the model was trained on, 'dog' among them",
            "2 classes, 'puma'",
        ),
        (["cat", "ape", "dog"], "expected the 2 classes that the model was trained on, got", "3 classes, 'ape' among"),
        (["puma", "quoll"], "trained on, 'cat', 'dog' among them", "2 classes, 'puma', 'quoll' among them"),
    ],
)
@pytest.mark.parametrize("command", ["test", "validate", "fit"])
def test_renamed_and_added_classes_are_errors_and_no_other_labels(
    trained, tmp_path, capsys, command, classes, expected, got
):
    images = write_classes(tmp_path / "images", dict.fromkeys(classes, 9))
    given = [
        "--ckpt_path",
        str(trained / "checkpoints" / "last.ckpt"),
        "--trainer.default_root_dir",
        str(tmp_path / "r"),
    ]
    assert main([command, *given, *QUIET, "--data", str(images)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("narrows: data: ")
    assert expected in printed
    assert got in printed
