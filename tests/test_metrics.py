from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import EMBEDDED_JUDGE, Judge, clip_accuracy, clip_score
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.core.token_rows import read_packed

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
DIAGONAL = torch.tensor([math.sqrt(0.5), math.sqrt(0.5)])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(None)


@pytest.fixture(scope="module")
def emoji() -> dict[str, np.ndarray]:
    """Eight pictures of each concept, drawn by the embedded model: uint8 [8, 128, 128, 3]."""
    model, settings = load_denoiser(device="cpu", precision="fp32"), SampleSettings(steps=12, eta=0.0)
    return {concept: draw_images(model, [concept] * 8, range(8), settings) for concept in ("a cat", "a rose")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_JUDGE, tmp_path / "my-judge"))


def test_score_is_the_mean_cosine() -> None:
    images = torch.stack([X, Y, DIAGONAL, -X])
    assert clip_score(images, X) == pytest.approx((1 + 0 + math.sqrt(0.5) - 1) / 4)
    assert clip_score(Y[None], X) == 0


def test_score_does_not_depend_on_length() -> None:
    assert clip_score(5 * DIAGONAL[None], 3 * X) == pytest.approx(math.sqrt(0.5))


def test_accuracy_counts_images_strictly_nearer_to_the_concept() -> None:
    images = torch.stack([X, Y, DIAGONAL, torch.tensor([0.8, 0.6])])
    assert clip_accuracy(images, X, Y) == 0.5
    assert clip_accuracy(images, Y, X) == 0.25


def test_accuracy_of_ties_is_zero() -> None:
    assert clip_accuracy(DIAGONAL[None], X, Y) == 0
    assert clip_accuracy(torch.stack([X, Y, DIAGONAL]), X, X) == 0


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (97, 203)])
def test_image_embedding_equals_open_clip(judge: Judge, size: tuple[int, int], folder: Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    save_file(read_packed(weights), weights)  # open_clip itself wants the whole token embedding
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert torch.equal(pixels, torch.stack([judge.preprocess(Image.fromarray(image)) for image in images]))
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(judge.embed_images(images, batch=2), expected, atol=1e-5, rtol=0)


def test_preprocessing_follows_the_folder_and_not_a_default(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["preprocess_cfg"]["mean"] = [0.25, 0.25, 0.25]
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    white = Image.new("RGB", (64, 64), "white")
    assert Judge.load(folder).preprocess(white).unique().tolist() == [(1 - 0.25) / 0.5]


def test_embeddings_are_normalised_fp32(judge: Judge) -> None:
    images = judge.embed_images(np.zeros((2, 32, 32, 3), np.uint8))
    texts = judge.embed_texts(["a cat", "a rose", "a dog"])
    assert (images.shape, texts.shape) == ((2, 192), (3, 192))
    assert images.dtype == texts.dtype == torch.float32
    for embedding in (*images, *texts, judge.embed_concept(["a cat", "a rose"])):
        assert embedding.norm().item() == pytest.approx(1, abs=1e-5)


def test_loading_the_embedded_judge_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Judge.load(None)
    assert not caplog.records


def test_concept_is_the_normalised_mean_of_its_texts(judge: Judge) -> None:
    texts = judge.embed_texts(["a cat", "an emoji of a cat"])
    bisector = (texts[0] + texts[1]) / (texts[0] + texts[1]).norm()
    torch.testing.assert_close(judge.embed_concept(["a cat", "an emoji of a cat"]), bisector)
    torch.testing.assert_close(judge.embed_concept(["a cat"]), texts[0])


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(judge: Judge, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge.embed_images(images)


def test_embedded_judge_tells_emoji_apart(judge: Judge, emoji: dict[str, np.ndarray]) -> None:
    cat, rose = judge.embed_texts(["a cat", "a rose"])
    cats, roses = judge.embed_images(emoji["a cat"]), judge.embed_images(emoji["a rose"])
    assert clip_accuracy(cats, cat, rose) >= 7 / 8
    assert clip_accuracy(roses, rose, cat) >= 7 / 8
    assert clip_accuracy(cats, rose, cat) <= 1 / 8
    assert clip_score(cats, cat) > clip_score(roses, cat) + 0.1
    assert clip_score(roses, rose) > clip_score(cats, rose) + 0.1


def test_folder_judge_equals_the_embedded_one(judge: Judge, folder: Path) -> None:
    # A pickle beside the safetensors file is left alone: opening this one would fail.
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"not a pickle")
    other = Judge.load(str(folder))
    assert (judge.name, other.name) == ("embedded emoji judge", "my-judge")
    assert torch.equal(other.embed_texts(["a cat"]), judge.embed_texts(["a cat"]))


def test_only_pickled_weights_are_refused(folder: Path) -> None:
    # open_clip itself would prefer this pickle over "weights.safetensors".
    (folder / "open_clip_model.safetensors").rename(folder / "weights.safetensors")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AblationError, match="pickled weights"):
        Judge.load(folder)


def test_folder_that_wants_to_run_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AblationError, match="run code"):
        Judge.load(folder)


def test_broken_folders_are_refused(folder: Path) -> None:
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(AblationError, match="Cannot load the judge"):
        Judge.load(folder)
    weights.write_bytes(whole)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"embed_dim": 192', '"embed_dim": 128'), encoding="utf-8")
    with pytest.raises(AblationError, match="Cannot load the judge"):
        Judge.load(folder)
    config.write_text("{", encoding="utf-8")
    with pytest.raises(AblationError, match="Cannot load the judge"):
        Judge.load(folder)
    weights.unlink()
    with pytest.raises(AblationError, match="has no weights"):
        Judge.load(folder)
    config.unlink()
    with pytest.raises(AblationError, match=r"no open_clip_config\.json"):
        Judge.load(folder)


def test_paths_that_are_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="does not exist"):
        Judge.load(tmp_path / "missing")
    with pytest.raises(AblationError, match="does not exist"):
        Judge.load("./missing")
    with pytest.raises(AblationError, match="single file"):
        Judge.load(EMBEDDED_JUDGE / "open_clip_model.safetensors")


@pytest.mark.parametrize("name", ["ViT-Z-99/openai", "ViT-Z-99", "nonsense"])
def test_unknown_models_are_refused(name: str) -> None:
    with pytest.raises(AblationError, match="neither a folder nor a model"):
        Judge.load(name)


def test_unknown_weights_are_refused_with_the_known_ones() -> None:
    with pytest.raises(AblationError, match="laion400m_e31"):
        Judge.load("ViT-L-14/nonsense")


@pytest.mark.parametrize(
    ("name", "model", "url"),
    [("ViT-L-14/openai", "vit_large_patch14", "ViT-L-14.pt"), ("ViT-B/32", "vit_base_patch32", "ViT-B-32.pt")],
)
def test_named_judge_without_a_connection(monkeypatch: pytest.MonkeyPatch, name: str, model: str, url: str) -> None:
    asked: list[dict[str, object]] = []

    def offline(source: dict[str, object]) -> str:
        asked.append(source)
        raise FileNotFoundError("no connection.\nsecond line")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(AblationError, match=r"\(no connection\).*local folder") as error:
        Judge.load(name)
    assert "\n" not in str(error.value)
    assert model in asked[0]["hf_hub"] and asked[0]["url"].endswith(url)


def test_named_judge_with_pickled_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: "weights.bin")
    with pytest.raises(AblationError, match="only pickled weights"):
        Judge.load("ViT-B-32/openai")


def test_named_judge_gets_the_activation_of_its_weights(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> None:
    calls: list[dict[str, object]] = []

    def create_model(source: str, **options: object) -> torch.nn.Module:
        calls.append({"source": source, **options})
        return judge.model

    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: "weights.safetensors")
    monkeypatch.setattr(open_clip, "create_model", create_model)
    Judge.load("ViT-B-32/openai")
    Judge.load("ViT-B-32/laion2b_s34b_b79k")
    assert [(call["pretrained"], call["force_quick_gelu"]) for call in calls] == [
        ("openai", True),
        ("laion2b_s34b_b79k", False),
    ]
