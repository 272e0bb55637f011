from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import ClipMetrics, ConceptResult, Evaluation, Role
from concept_ablation.core.phases import Phase
from concept_ablation.core.report import DeltaInfo, ReportInputs, before_after_grid, delta_info, loss_plot, write_report

FILES = ["before_after.png", "loss.png", "report.html", "report.json"]


def result(
    name: str,
    role: Role,
    before: float,
    after: float,
    *,
    ablation: str = "tiger",
    prompts: int = 2,
    seeds: int = 3,
    size: tuple[int, int] = (32, 32),
) -> ConceptResult:
    """A result whose pictures are each of one colour: red grows with the prompt, green with the seed, blue = after."""
    images = np.zeros((prompts, seeds, *size, 3), np.uint8)
    images[..., 0] = 60 * np.arange(prompts)[:, None, None, None] + 40
    images[..., 1] = 60 * np.arange(seeds)[None, :, None, None] + 40
    edited = images.copy()
    edited[..., 2] = 255
    return ConceptResult(
        name=name,
        role=role,
        ablation=ablation,
        prompts=tuple(f"{name} no. {index}" for index in range(prompts)),
        seeds=tuple(range(100, 100 + seeds)),
        before=ClipMetrics(before, 0.3),
        after=ClipMetrics(after, 0.1),
        images_before=images,
        images_after=edited,
    )


def inputs(*results: ConceptResult, concepts: tuple[Concept, ...] = (Concept("tiger", "cat"),)) -> ReportInputs:
    return ReportInputs(
        evaluation=Evaluation(results, "a judge", {"evaluation": 2.0}, {"steps": 12}),
        concepts=concepts,
        delta=DeltaInfo("tiger.safetensors", 12, "ab" * 32),
        losses=(0.5, 0.25, 0.125),
        seconds={"training": 150.0},
        settings={"learning_rate": 1e-4, "worst": float("nan"), "folder": Path("somewhere"), "rows": np.int64(3)},
        model="Emoji Diffusion",
        phases=(Phase("training", 150.0, 3200, 1600),),
    )


def usual() -> ReportInputs:
    return inputs(
        result("tiger", "target", 1.0, 0.0), result("cat", "anchor", 1.0, 1.0), result("dog", "surrounding", 0.8, 0.7)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Page(HTMLParser):
    """Tags, links and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self._text: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def pictures(self) -> list[Image.Image]:
        """The embedded pictures in their order, without the plot of the loss."""
        webp = [link for link in self.links if link.startswith("data:image/webp;base64,")]
        return [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).convert("RGB") for link in webp]


def test_delta_info(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"abc")
    assert delta_info(path) == DeltaInfo("delta.safetensors", 3, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(AblationError, match="Cannot read the delta file"):
        delta_info(tmp_path / "missing")


def test_json_has_the_fixed_form(tmp_path: Path) -> None:
    page = write_report(tmp_path / "new" / "folder", usual())
    text = (page.parent / "report.json").read_text(encoding="utf-8")

    def metrics(accuracy: float, score: float) -> dict[str, float]:
        return {"clip_accuracy": accuracy, "clip_score": score}

    assert json.loads(text, parse_constant=pytest.fail) == {
        "concepts": [
            {
                "name": name,
                "role": role,
                "ablation": "tiger",
                "before": metrics(before, 0.3),
                "after": metrics(after, 0.1),
                "details": None,
            }
            for name, role, before, after in [
                ("tiger", "target", 1.0, 0.0),
                ("cat", "anchor", 1.0, 1.0),
                ("dog", "surrounding", 0.8, 0.7),
            ]
        ],
        "seconds": {"evaluation": 2.0, "training": 150.0},
        "phases": [{"name": "training", "seconds": 150.0, "forward": 3200, "backward": 1600}],
        "delta": {"file": "tiger.safetensors", "bytes": 12, "sha256": "ab" * 32},
        "settings": {
            "learning_rate": 1e-4,
            "worst": None,
            "folder": "somewhere",
            "rows": 3,
            "evaluation": {"steps": 12},
        },
        "judge": "a judge",
        "model": "Emoji Diffusion",
        "ablations": [{"target": "tiger", "anchor": "cat", "kind": "instance"}],
    }


def test_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    assert write_report(tmp_path, usual()) == tmp_path / "report.html"
    assert names(tmp_path) == FILES
    for name in FILES[:2]:
        Image.open(tmp_path / name).verify()


def test_no_losses_no_plot(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, dataclasses.replace(usual(), losses=())))
    assert not (tmp_path / "loss.png").exists()
    assert "Training loss" not in page.text


@pytest.mark.parametrize("failing", FILES)
def test_a_failed_write_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    touch = Path.touch

    def fail(path: Path) -> None:
        if path.name.startswith(f".{Path(failing).stem}.") and path.suffix == Path(failing).suffix:
            raise OSError(28, "No space left on device")
        touch(path)

    monkeypatch.setattr(Path, "touch", fail)
    with pytest.raises(AblationError, match="disk is full"):
        write_report(tmp_path, usual())
    written_before = {"report.json": 0, "before_after.png": 1, "loss.png": 2, "report.html": 3}[failing]
    assert names(tmp_path) == sorted(["report.json", "before_after.png", "loss.png"][:written_before])


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError(13, "denied")))
    with pytest.raises(AblationError, match="denied"):
        write_report(tmp_path, usual())
    # what could not take its place is kept beside it
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, usual()))
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.source and "@import" not in page.source


def test_page_has_every_picture_in_pairs_and_in_order(tmp_path: Path) -> None:
    concepts = usual().evaluation.concepts
    pictures = Page(write_report(tmp_path, usual())).pictures()
    expected = [
        side[prompt, seed, 16, 16]
        for item in concepts
        for prompt in range(2)
        for seed in range(3)
        for side in (item.images_before, item.images_after)
    ]
    shown = np.array([picture.getpixel((16, 16)) for picture in pictures], int)
    assert shown.shape == (3 * 2 * 3 * 2, 3)
    assert np.abs(shown - np.array(expected, int)).max() <= 8


def test_page_limits_and_shrinks_pictures(tmp_path: Path) -> None:
    target = result("tiger", "target", 1.0, 0.0, prompts=3, seeds=20, size=(512, 256))
    neighbour = result("dog", "surrounding", 1.0, 1.0, prompts=9, seeds=3, size=(64, 64))
    page = Page(write_report(tmp_path, inputs(target, neighbour)))
    assert [picture.size for picture in page.pictures()] == [(160, 320)] * 48 + [(64, 64)] * 16
    assert "Shown are 24 of the 60 pairs" in page.text
    assert "8 of 27 pairs" in page.text


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"co\""
    given = inputs(
        result(evil, "target", 1.0, 0.0, ablation=evil), result(evil + "2", "surrounding", 1.0, 0.5, ablation=evil)
    )
    given = dataclasses.replace(
        given,
        concepts=(Concept(evil, f"{evil}3"),),
        model=evil,
        delta=DeltaInfo(evil, 1, evil),
        settings={evil: evil},
        seconds={evil: 1.0},
        evaluation=dataclasses.replace(given.evaluation, judge=evil),
    )
    page = Page(write_report(tmp_path, given))
    assert "script" not in page.tags
    assert "<script" not in page.source and "&amp;lt;" not in page.source
    assert html.escape("<script>alert") in page.source
    assert f"The image model {evil} was edited" in page.text


def test_page_says_what_was_found(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path, usual())).text
    assert "in 6 of 6 pictures (100%) before the edit and in 0 of 6 (0%) after it" in text
    assert "hardly ever draws “tiger”" in text
    # 1 - 0.05 ** (1/6) = 0.393
    assert "None of 6 pictures is not never: even for these requests “tiger” could appear in up to about 39%" in text
    assert "train the concept back in" in text
    for shown in ("a judge", "Emoji Diffusion", "ab" * 32, "<lora:tiger:1>", "2.5 min", "tiger no. 1", "dog no. 0"):
        assert shown in text


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (1.0, 0.1, "hardly ever draws"),
        (1.0, 0.5, "The removal is partial."),
        (1.0, 0.6, "The removal did not succeed."),
        (0.4, 0.0, "The figures cannot tell."),
    ],
)
def test_verdict_follows_the_figures(tmp_path: Path, before: float, after: float, verdict: str) -> None:
    verdicts = ["hardly ever draws", "The removal is partial.", "The removal did not succeed.", "figures cannot tell."]
    text = Page(write_report(tmp_path, inputs(result("tiger", "target", before, after)))).text
    assert verdict in text
    assert sum(item in text for item in verdicts) == 1


@pytest.mark.parametrize(("after", "flagged"), [(0.7, False), (0.69, True), (0.95, False)])
def test_neighbour_is_flagged_above_ten_points(tmp_path: Path, after: float, flagged: bool) -> None:
    # 0.8 - 0.7 is above 0.1 in binary; ten points are not "more than ten points".
    given = inputs(result("tiger", "target", 1.0, 0.0), result("dog", "surrounding", 0.8, after))
    text = Page(write_report(tmp_path, given)).text
    assert ("1 of 1 other concept changed noticeably" in text) == flagged
    assert ("recognised less often by more than 10 percentage points): “dog”" in text) == flagged


@pytest.mark.parametrize(("share", "shown"), [(0.004, "(under 1%)"), (0.996, "(over 99%)"), (0.125, "(12%)")])
def test_percentages_claim_no_extreme_that_is_not_exact(tmp_path: Path, share: float, shown: str) -> None:
    assert shown in Page(write_report(tmp_path, inputs(result("tiger", "target", 1.0, share)))).text


def test_missing_neighbours_are_admitted(tmp_path: Path) -> None:
    target, anchor = usual().evaluation.concepts[:2]
    assert "No other concept was measured" in Page(write_report(tmp_path, inputs(target))).text
    assert "No neighbouring concept was measured" in Page(write_report(tmp_path, inputs(target, anchor))).text
    assert "concept was measured" not in Page(write_report(tmp_path, usual())).text


def test_nested_settings_are_readable(tmp_path: Path) -> None:
    given = dataclasses.replace(usual(), settings={"sample": {"steps": 12, "size": [128, 96]}, "seed": None})
    text = Page(write_report(tmp_path, given)).text
    assert "sample, steps 12 sample, size 128, 96 seed –" in text


def test_each_ablation_has_its_section(tmp_path: Path) -> None:
    given = inputs(
        result("tiger", "target", 1.0, 0.0),
        result("Van Gogh", "target", 1.0, 1.0, ablation="Van Gogh"),
        result("painting", "anchor", 1.0, 1.0, ablation="Van Gogh"),
        concepts=(Concept("tiger", "cat"), Concept("Van Gogh", "painting", "style")),
    )
    text = Page(write_report(tmp_path, given)).text
    first, second = text.index("“tiger” → “cat”"), text.index("“Van Gogh” → “painting”")
    assert first < text.index("hardly ever draws “tiger”") < second < text.index("The removal did not succeed.")


def test_results_must_match_the_ablations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not made.*lion"):
        write_report(tmp_path, inputs(result("tiger", "target", 1, 0), result("lion", "target", 1, 0, ablation="lion")))
    with pytest.raises(ValueError, match=r"no result for the target.*tiger"):
        write_report(tmp_path, inputs(result("cat", "anchor", 1, 1)))
    assert names(tmp_path) == []


def test_grid_grows_with_concepts_and_seeds() -> None:
    def size(*results: ConceptResult) -> tuple[int, int]:
        return before_after_grid(Evaluation(results, "", {}, {})).size

    concepts = usual().evaluation.concepts
    one, two, three = (size(*concepts[:count]) for count in (1, 2, 3))
    row = two[1] - one[1]
    assert row > 32 and three == (one[0], one[1] + 2 * row)
    widths = [size(result("tiger", "target", 1, 0, seeds=seeds))[0] for seeds in (2, 3, 6, 7)]
    assert widths[0] < widths[1] == one[0] < widths[2] == widths[3]


def test_grid_shows_before_left_and_after_right_with_the_same_seeds() -> None:
    grid = np.array(before_after_grid(Evaluation((result("tiger", "target", 1, 0),), "", {}, {})))
    lefts: dict[int, list[int]] = {0: [], 255: []}
    for blue, columns in lefts.items():
        for seed in range(3):
            found = np.argwhere((grid == (40, 60 * seed + 40, blue)).all(axis=-1))
            assert len(found) == 32 * 32
            columns.append(int(found[:, 1].min()))
    assert np.diff(lefts[0]).tolist() == np.diff(lefts[255]).tolist() == [36, 36]
    assert lefts[255][0] > lefts[0][-1] + 36


@pytest.mark.parametrize(
    ("size", "tile"), [((128, 128), (128, 128)), ((512, 512), (160, 160)), ((512, 1024), (80, 160))]
)
def test_grid_scales_large_pictures_down(size: tuple[int, int], tile: tuple[int, int]) -> None:
    grid = np.array(before_after_grid(Evaluation((result("t", "target", 1, 0, seeds=1, size=size),), "", {}, {})))
    found = np.argwhere((grid == (40, 40, 255)).all(axis=-1))
    assert tuple(found.max(axis=0) - found.min(axis=0) + 1) == tile


def test_long_names_stay_in_their_column() -> None:
    evaluation = Evaluation((result("unpronounceable" * 20 + " and more words" * 20, "target", 1, 0),), "", {}, {})
    plain = Evaluation((result("x", "target", 1, 0),), "", {}, {})
    long, short = np.array(before_after_grid(evaluation)), np.array(before_after_grid(plain))
    assert long.shape == short.shape
    label = 24 + 200 - 16
    assert (long[:, :label] != short[:, :label]).any()
    assert (long[:, label + 2 :] == short[:, label + 2 :]).all()


@pytest.mark.parametrize("losses", [(0.5,), tuple(np.linspace(1, 0, 300))])
def test_loss_plot_is_a_picture(losses: tuple[float, ...]) -> None:
    picture = Image.open(io.BytesIO(loss_plot(losses)))
    assert (picture.format, picture.size) == ("PNG", (960, 360))


def test_smoothed_loss_starts_at_the_loss_and_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[np.ndarray] = []
    plot = Axes.plot

    def spy(self: Axes, x: object, y: object, *args: object, **options: object) -> object:
        drawn.append(np.array(y, float))
        return plot(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    loss_plot((3.0,) * 40 + (1.0,) * 40)
    raw, smooth = drawn
    # Weights of the last 1, 2, 3 … steps are 1/4 · (3/4)^k for 80 steps: a mean over 80 / 20 = 4 of them.
    assert smooth[:40] == pytest.approx(3.0)
    assert smooth[40] == pytest.approx(3 - 2 / 4, rel=1e-4)
    assert smooth[41] == pytest.approx(3 - 2 * (1 / 4 + 3 / 16), rel=1e-4)
    assert raw[-1] == 1 and smooth[-1] == pytest.approx(1, abs=1e-3)
