from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from concept_ablation.core import kid as module
from concept_ablation.core.errors import AblationError
from concept_ablation.core.kid import inception_features, kid, spherical

RNG = np.random.default_rng(11)


def normal(*shape: int, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(RNG.normal(shift, 1, shape))


def naive(x: Tensor, y: Tensor) -> float:
    """Equation 4 of Gretton et al. 2012, one pair of rows at a time."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    xs, ys = x.tolist(), y.tolist()
    pairs = list(permutations(range(len(xs)), 2))
    values = [kernel(xs[i], xs[j]) + kernel(ys[i], ys[j]) - 2 * kernel(xs[i], ys[j]) for i, j in pairs]
    return sum(values) / len(values)


def jackknife(x: Tensor, y: Tensor, blocks: np.ndarray) -> float:
    """Standard error from whole distances, each computed anew without one block."""
    labels = sorted(set(blocks.tolist()))
    left = [naive(x[blocks != label], y[blocks != label]) for label in labels]
    whole = naive(x, y)
    return math.sqrt((len(labels) - 1) / len(labels) * sum((value - whole) ** 2 for value in left))


def test_equals_the_sum_over_all_pairs_but_those_of_one_prompt_and_seed() -> None:
    x = normal(8, 5)
    for y in (normal(8, 5, shift=0.5), x + 0.3 * normal(8, 5)):
        found = kid(x, y, range(8))
        assert found.value == pytest.approx(naive(x, y), rel=1e-12)
        assert found.standard_error == pytest.approx(jackknife(x, y, np.arange(8)), rel=1e-9)


def test_groups_are_left_out_together() -> None:
    x, y = normal(9, 4), normal(9, 4, shift=1)
    groups = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])
    found = kid(x, y, [f"prompt {label}" for label in groups])
    assert found.value == pytest.approx(naive(x, y), rel=1e-12)
    assert found.standard_error == pytest.approx(jackknife(x, y, groups), rel=1e-9)


def test_agrees_with_sklearn() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = normal(40, 16), normal(40, 16, shift=0.2)
    xx, yy, xy = (
        pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 16, coef0=1) for a, b in ((x, x), (y, y), (x, y))
    )
    expected = sum(sign * (sums.sum() - np.trace(sums)) for sign, sums in ((1, xx), (1, yy), (-2, xy))) / (40 * 39)
    assert kid(x, y, range(40)).value == pytest.approx(expected, rel=1e-10)


def test_known_answer_in_one_dimension() -> None:
    # k(1, 1) = 8, k(1, 0) = 1, k(0, 0) = 1
    assert kid(torch.ones(3, 1), torch.zeros(3, 1), range(3)).value == 8 + 1 - 2 * 1


def test_is_zero_in_expectation_for_one_distribution_though_its_rows_come_in_pairs() -> None:
    def draw() -> tuple[Tensor, Tensor]:
        common = normal(30, 8)
        return common + 0.3 * normal(30, 8), common + 0.3 * normal(30, 8)

    for drawn in (draw, lambda: (normal(30, 8), normal(30, 8))):
        values = np.array([kid(*drawn(), range(30)).value for _ in range(300)])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
        assert (values < 0).any() and (values > 0).any()


def test_nothing_changed() -> None:
    x = normal(20, 8)
    found = kid(x, x.clone(), range(20))
    assert found.value == pytest.approx(0, abs=1e-12) and found.standard_error == pytest.approx(0, abs=1e-12)


def test_grows_with_a_shift() -> None:
    x, y = normal(200, 16), normal(200, 16)
    values = [kid(x, y + shift, range(200)).value for shift in (0, 0.2, 0.4, 0.8)]
    assert values == sorted(values)
    found = kid(x, y + 0.8, range(200))
    assert found.value > 10 * found.standard_error


def test_standard_error_is_the_spread_of_repetitions() -> None:
    found = [kid(normal(70, 8), normal(70, 8, shift=0.5), range(70)) for _ in range(200)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.2)


def test_standard_error_counts_prompts_and_not_images() -> None:
    def draw(shift: float, groups: np.ndarray) -> Tensor:
        return normal(groups.max() + 1, 8, shift=shift)[groups] + 0.2 * normal(len(groups), 8)

    groups = np.repeat(np.arange(20), 5)
    grouped, blind, values = [], [], []
    for _ in range(100):
        x, y = draw(0, groups), draw(0.8, groups)
        found = kid(x, y, groups)
        grouped.append(found.standard_error)
        blind.append(kid(x, y, range(len(groups))).standard_error)
        values.append(found.value)
    assert np.mean(grouped) == pytest.approx(np.std(values), rel=0.25)
    assert np.mean(blind) < 0.6 * np.std(values)


def test_does_not_depend_on_the_size_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(23, 6), normal(23, 6)
    groups = np.arange(23) % 5
    whole = kid(x, y, groups)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 4)
    parts = kid(x, y, groups)
    assert (parts.value, parts.standard_error) == pytest.approx((whole.value, whole.standard_error))


def test_fp16_features_are_summed_in_fp64() -> None:
    x, y = normal(30, 8).half(), normal(30, 8).half()
    groups = range(30)
    assert kid(x, y, groups).value == pytest.approx(kid(x.double(), y.double(), groups).value, rel=1e-12)


def test_too_few_blocks_have_no_standard_error() -> None:
    x, y = normal(6, 4), normal(6, 4)
    for groups in ([0] * 6, [0, 0, 0, 0, 0, 1]):
        found = kid(x, y, groups)
        assert found.value == pytest.approx(naive(x, y)) and math.isnan(found.standard_error)


@pytest.mark.parametrize(
    ("x", "y", "groups"),
    [
        (normal(1, 4), normal(1, 4), [0]),
        (normal(5, 4), normal(5, 3), range(5)),
        (normal(5, 4), normal(6, 4), range(5)),
        (normal(5, 4), normal(5, 4), range(4)),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, y: Tensor, groups: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"features|groups"):
        kid(x, y, groups)


def test_embeddings_reach_the_kernel_as_cosines() -> None:
    embedded = torch.nn.functional.normalize(normal(3, 16), dim=1)
    features = spherical(embedded)
    torch.testing.assert_close(features @ features.t() / features.shape[1], embedded @ embedded.t())


class Layers(torch.nn.Module):
    """In place of Inception: 2,048 numbers that tell the mean of each colour and the first pixel."""

    def forward(self, pixels: Tensor) -> Tensor:
        colours = torch.cat((pixels.mean(dim=(2, 3)), pixels[:, :, 0, 0]), dim=1)
        return torch.nn.functional.pad(colours, (0, 2042))[:, :, None, None]


class Inception(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def test_inception_file(tmp_path: Path) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Inception()).save(str(path))
    images = np.zeros((40, 16, 16, 3), np.uint8)
    images[:, :, :, 0] = 255
    images[:, :, :, 2] = np.arange(40)[:, None, None]
    found = inception_features(path)(images)
    assert found.shape == (40, 2048) and found.dtype == torch.float32
    blue = (torch.arange(40) - 128) / 128
    torch.testing.assert_close(found[:, :6], torch.stack([torch.full((40,), 127 / 128), -torch.ones(40), blue] * 2, 1))


def test_inception_input_is_resized_without_rounding_as_clean_fid_does() -> None:
    """A ramp of three pixels by PIL's bicubic filter in fp32 (a = -0.5, antialiased where it shrinks)."""
    image = np.repeat(np.array([0, 100, 250], np.uint8)[None, None, :, None], 3, axis=3)
    found = (module._inception_input(image) * 128 + 128)[0, 0, 0]
    assert found.shape == (module._INCEPTION_SIZE,)

    def filtered(place: int) -> float:
        centre = (place + 0.5) * 3 / module._INCEPTION_SIZE
        distance = np.abs(np.arange(3) + 0.5 - centre)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        return float(np.clip((weight * [0, 100, 250]).sum() / weight.sum(), 0, 255))

    for place in (0, 40, 77, 150, 222, 298):
        assert found[place].item() == pytest.approx(filtered(place), abs=0.02)


def test_inception_without_weights(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="no Inception weights"):
        inception_features(tmp_path / "inception-2015-12-05.pt")
    other = tmp_path / "other.pt"
    torch.jit.script(Layers()).save(str(other))
    with pytest.raises(AblationError, match="not the Inception network"):
        inception_features(other)
    other.write_bytes(b"nothing")
    with pytest.raises(AblationError, match="not the Inception network"):
        inception_features(other)
