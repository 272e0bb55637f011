"""Judges on open_clip 2.x: what is put together here must be what open_clip 3 makes of the same folder."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from concept_ablation.core import old_open_clip
from concept_ablation.core.errors import AblationError
from concept_ablation.core.metrics import EMBEDDED_JUDGE, Judge

CONFIG, WEIGHTS = EMBEDDED_JUDGE / "open_clip_config.json", EMBEDDED_JUDGE / "open_clip_model.safetensors"


@pytest.fixture
def old(monkeypatch):
    monkeypatch.setattr(old_open_clip, "is_old", lambda: True)


def test_the_embedded_judge_is_the_same_on_old_and_new_open_clip(monkeypatch):
    new = Judge.load()
    monkeypatch.setattr(old_open_clip, "is_old", lambda: True)
    old = Judge.load()
    images = np.random.default_rng(0).integers(0, 256, (2, 97, 128, 3), dtype=np.uint8)
    torch.testing.assert_close(old.embed_images(images), new.embed_images(images), atol=1e-5, rtol=0)
    texts = ["a tropical fish", "A  Rooster, by noto"]
    torch.testing.assert_close(old.embed_texts(texts), new.embed_texts(texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pictures_are_prepared_as_open_clip_3_does(mode):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    said = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bicubic", "resize_mode": mode}
    theirs = image_transform_v2(PreprocessCfg(size=64, **said), is_train=False)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    torch.testing.assert_close(old_open_clip.preparation(64, said)(picture), theirs(picture))


def test_what_only_open_clip_3_can_is_said(old, tmp_path):
    with pytest.raises(AblationError, match="'longest'"):
        old_open_clip.preparation(64, {"resize_mode": "longest"})
    told = json.loads(CONFIG.read_text(encoding="utf-8"))
    told["model_cfg"]["custom_text"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(AblationError, match="needs open_clip 3"):
        Judge.load(tmp_path)


def test_a_named_judge_is_fetched_as_safetensors(old, monkeypatch, tmp_path):
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(WEIGHTS)

    model = old_open_clip.from_folder(CONFIG, WEIGHTS).model
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "laion/CLIP/", "mean": None, "std": None}
    )
    monkeypatch.setattr(open_clip, "create_model", lambda name: model)
    assert Judge.load("ViT-B-32/laion2b_s34b_b79k").model is model
    assert asked == [("laion/CLIP", "open_clip_model.safetensors")]


def test_a_named_judge_that_is_pickled_only_is_refused(old, monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "https://x/y.pt", "hf_hub": "a/b/"})
    with pytest.raises(AblationError, match="only pickled weights"):
        Judge.load("ViT-B-32/openai")


def test_a_named_judge_without_a_connection(old, monkeypatch):
    def offline(*_: object) -> str:
        raise OSError("no connection.\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "laion/CLIP/"})
    with pytest.raises(AblationError, match=r"\(no connection\).*local folder"):
        Judge.load("ViT-B-32/laion2b_s34b_b79k")
