"""Model cards say what is known and nothing else; a hub that stands in takes and gives models."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from narrows.errors import InvalidArgument
from narrows.hub.models import open_model, save_model
from narrows.models import ATSViT, Segmenter, create_model, load_model

SMALL = {"depth": 2, "dim": 16, "heads": 2, "mlp_dim": 16}


def card_in(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    assert "More Information" not in card.content
    return card


def code_in(card: ModelCard) -> str:
    return card.text.partition("```python\n")[2].partition("```")[0]


def small() -> ATSViT:
    torch.manual_seed(0)
    model = create_model("ats_vit_mini", num_classes=2, channels=1)
    model.classes = ("a|b", "*c*")
    model.about = {"Data": "flowers: 80 training images", "Held-out accuracy": "93.5 %"}
    return model


def test_a_card_says_task_classes_data_figures_and_the_code_that_loads(tmp_path: Path, monkeypatch) -> None:
    small().save_pretrained(tmp_path / "flowers")
    card = card_in(tmp_path / "flowers")
    assert card.data.to_dict() == {
        "library_name": "narrows",
        "pipeline_tag": "image-classification",
        "tags": ["narrows", "token-bottleneck"],
    }
    for row in (
        "| Task | image classification |",
        r"| Classes | 2: a\|b, \*c\* |",
        "| Images | 32 × 32 pixels, grey |",
        "| Data | flowers: 80 training images |",
        "| Held-out accuracy | 93.5 % |",
        f"| Parameters | {sum(p.numel() for p in small().parameters()):,} |",
    ):
        assert row in card.text, row
    assert "adaptive token sampling" in card.text
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code_in(card), found)
    assert torch.equal(found["model"].head.weight, small().head.weight)


def test_what_is_known_stays_with_the_model(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "one")
    again = load_model(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", model_card_kwargs={"Licence of the images": "CC0"})
    assert again.about == small().about
    first, second = (card_in(tmp_path / name).text for name in ("one", "two"))
    assert second == first.replace("one", "two").replace("93.5 % |\n", "93.5 % |\n| Licence of the images | CC0 |\n")


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    create_model("vit_mini", **SMALL).save_pretrained(tmp_path / "vit")
    rows = [line.split("|")[1].strip() for line in card_in(tmp_path / "vit").text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row] == ["Task", "Parameters", "Images"]
    Segmenter("sepvit_lite", num_classes=3, dim=8).save_pretrained(tmp_path / "segmenter")
    assert "from narrows.models.segmenter import Segmenter" in code_in(card_in(tmp_path / "segmenter"))
    create_model("slot_autoencoder").save_pretrained(tmp_path / "objects")
    assert card_in(tmp_path / "objects").data.pipeline_tag == "image-segmentation"


def test_a_model_of_timm_gets_a_card_with_timms_code(tmp_path: Path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=2)
    save_model(model, tmp_path / "theirs", classes=["a", "b"], about={"Held-out accuracy": "50.0 %"})
    card = card_in(tmp_path / "theirs")
    assert card.data.library_name == "timm"
    assert "| Architecture | test\\_vit of timm |" in card.text
    assert "| Held-out accuracy | 50.0 % |" in card.text
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code_in(card), found)
    assert torch.equal(found["model"].head.weight, model.head.weight)
    assert open_model(f"timm:local-dir:{tmp_path / 'theirs'}").classes == ("a", "b")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Hugging Face hub."""
    root = tmp_path / "hub"

    def create_repo(self: object, repo_id: str, **_: object) -> huggingface_hub.RepoUrl:
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: object, *, repo_id: str, folder_path: Path, **_: object) -> str:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id: str, filename: str, **_: object) -> str:
        if not (root / repo_id / filename).is_file():
            raise FileNotFoundError(filename)
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("narrows.models.base.hf_hub_download", download)
    return root


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_model_goes_to_the_hub_and_comes_back(hub: Path, tmp_path: Path, way: str) -> None:
    if way == "push_to_hub":
        address = small().push_to_hub("user/flowers")
    else:
        address = small().save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="user/flowers")
    assert address == "https://huggingface.co/user/flowers/commit/1"
    assert {path.name for path in (hub / "user/flowers").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = card_in(hub / "user/flowers")
    assert "# user/flowers" in card.text
    found: dict = {}
    exec(code_in(card), found)
    model = found["model"]
    assert (model.classes, dict(model.about)) == (small().classes, dict(small().about))
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(images), small().eval()(images))


def test_what_somebody_made_of_the_facts_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    model.about = {"Data": 3}
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="about: expected texts by their names"):
        load_model(tmp_path)
