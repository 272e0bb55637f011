"""The leak scan on a painter whose every word has a known colour: what was planted is found, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from concept_ablation.core.concept import Concept, PromptPair, evaluation_prompts, pairs
from concept_ablation.core.delta import Delta, LayerDelta, zeros
from concept_ablation.core.denoiser import Conditioning, Denoiser, LatentCodec
from concept_ablation.core.errors import AblationError, IncompatibleDelta, Interrupted
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_hints
from concept_ablation.core.leak_candidates import (
    Candidate,
    Words,
    candidates,
    nearest_words,
    plain_prompts,
    words_from_categories,
)
from concept_ablation.core.leak_sheets import contact_sheet, write_feed_back, write_leak_report, write_leaks
from concept_ablation.core.leaks import (
    ScanSettings,
    by_copies,
    by_judge,
    further_target_prompts,
    scan,
    typical_pictures,
)
from concept_ablation.core.metrics import Judge
from concept_ablation.core.misspellings import edit_distance
from concept_ablation.core.prompts import BUILT_IN, normalise
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.subsets import select

ROOSTER = Concept("rooster", "bird")
WORDS = Words(
    categories=("poultry",),
    synonyms=("cockerel", "chanticleer"),
    descriptions=("a farm animal that crows",),
    styles=("noto",),
    neighbours=("owl",),
)
COLOURS = {
    "rooster": (1.0, 0.0, 0.0),
    "cockerel": (1.0, 0.0, 0.0),
    "chanticleer": (1.0, 0.0, 0.0),
    "bird": (0.0, 0.0, 1.0),
    "owl": (0.0, 1.0, 0.0),
}
SETTINGS = ScanSettings(each=6, seeds=2, suspects=4, more_seeds=6, pictures=3, sample=SampleSettings(steps=2), batch=50)


class Plain(LatentCodec):
    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(0, 1)


class Painter(Denoiser):
    """Paints the mean colour of the words that it knows; its one layer maps words to colours, so a delta can edit it.

    Every picture has a little noise from its seed, and is white where no word is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.architecture, self.name, self.device = "sd1", "painter", torch.device("cpu")
        self.words = list(COLOURS)
        self.network = nn.Linear(len(self.words), 3, bias=False).requires_grad_(False)
        self.network.weight.copy_(torch.tensor(list(COLOURS.values())).T)
        self.text_network, self.vae = None, Plain()
        self.layers = {"lora_unet_colours": self.network}
        self.sigmas = torch.linspace(0.1, 10, 20)
        self.latent_shape = (3, 4, 4)
        self.prompt_source = BUILT_IN

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        colour = self.network(cond.context).amax(dim=1)
        colour = torch.where(cond.context.sum(dim=(1, 2))[:, None] > 0, colour, torch.ones(3))
        return colour[:, :, None, None] * 0.9 + 0.02 * x / sigma.view(-1, 1, 1, 1)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        said = [[[float(name == word) for name in self.words] for word in prompt.split()[:12]] for prompt in prompts]
        length = 12
        rows = [row + [[0.0] * len(self.words)] * (length - len(row)) for row in said]
        return Conditioning({"context": torch.tensor(rows)})

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


class ColourJudge:
    """Stands in for CLIP: pictures are their mean colour, concepts the colours of the painter's words."""

    def embed_images(self, images: np.ndarray) -> Tensor:
        return F.normalize(torch.tensor(images.mean(axis=(1, 2)) / 255).float(), dim=-1)

    def embed_concept(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(COLOURS[texts[0]])


def blocking(*words: str) -> Delta:
    """An edit that gives `words` the anchor's colour."""
    change = torch.zeros(3, len(COLOURS))
    for place, word in enumerate(COLOURS):
        if word in words:
            change[:, place] = torch.tensor(COLOURS["bird"]) - torch.tensor(COLOURS[word])
    return Delta({"lora_unet_colours": LayerDelta(change)})


def scanned(delta: Delta, words: Words = WORDS, **options: object):
    painter = Painter()
    recognise = by_judge(ColourJudge(), ROOSTER, words.neighbours, typical_pictures(painter, ROOSTER, SETTINGS))
    return scan(painter, delta, ROOSTER, recognise, SETTINGS, words, **options)


def test_the_planted_leak_is_found_and_comes_first():
    report = scanned(blocking("rooster", "chanticleer"))
    worst = report.findings[0]
    assert worst.candidate == Candidate("a cockerel", "synonym", "cockerel", "a bird")
    assert worst.verdict == "leak" and worst.confirmed
    assert (worst.before.value, worst.after.value, worst.after.high) == (1, 1, 1)
    assert worst.after.low == pytest.approx(0.05 ** (1 / 6))
    assert all("cockerel" in finding.candidate.prompt for finding in report.leaks)
    others = [finding for finding in report.findings if "cockerel" not in finding.candidate.prompt]
    assert others and all(finding.after.value == 0 and finding.verdict == "none" for finding in others)
    assert (report.false_alarms.value, report.target_before.value, report.target_after.value) == (0, 1, 0)
    assert PromptPair("a bird", "a cockerel") in further_target_prompts(report)


def test_an_edit_that_blocks_nothing_leaves_every_candidate_a_leak_and_one_that_blocks_all_none():
    red = Words(synonyms=("cockerel", "chanticleer"), styles=("noto",))
    settings = replace(SETTINGS, each=4, seeds=6, suspects=3, more_seeds=20)
    recognise = by_judge(ColourJudge(), ROOSTER, typical=typical_pictures(Painter(), ROOSTER, settings))
    names = {"rooster", "cockerel", "chanticleer"}
    open_ = scan(Painter(), blocking(), ROOSTER, recognise, settings, red)
    told = [one for one in open_.findings if names & set(one.candidate.prompt.split())]
    assert len(told) >= 8 and all(one.verdict == "leak" for one in told)
    # a typo means nothing to the painter, so those are the only ones that never reached the target
    assert {one.candidate.family for one in open_.findings if one not in told} == {"misspelling"}
    shut = scan(Painter(), blocking(*names), ROOSTER, recognise, settings, red)
    assert shut.leaks == () and further_target_prompts(shut) == ()
    assert all(one.verdict == "none" and one.after.value == 0 for one in shut.findings)
    assert {one.before.value for one in shut.findings if one.candidate.family == "synonym"} == {1}


def test_only_the_worst_keep_pictures_and_suspects_are_judged_by_new_ones():
    report = scanned(blocking("rooster"))
    assert [one.images_after is not None for one in report.findings[:4]] == [True, True, True, False]
    assert report.findings[0].images_after.shape == (6, 4, 4, 3)
    assert report.findings[0].images_after.base is None
    assert sum(one.confirmed for one in report.findings) == 4
    assert report.pictures == 2 * (2 * len(report.findings) + 6 * (4 + 2))


def test_a_style_is_asked_for_in_the_prompt_that_shows_it_best():
    """Typing errors in a prompt that never showed the style would reach it in none and say nothing."""
    style = Concept("rooster", "bird", "style")
    plain = plain_prompts(style, BUILT_IN)
    best = next(pair for pair in plain[1:] if len(pair[0].split()) <= 12)  # the painter reads no further
    shown = best[1]

    class Deaf(Painter):
        def _encode(self, prompts: Sequence[str]) -> Conditioning:
            heard = [text if text.startswith(shown) else text.replace("rooster", "") for text in prompts]
            return super()._encode(heard)

    report = scan(Deaf(), blocking(), style, lambda images: images[:, 0, 0, 0] / 255 - 0.5, SETTINGS, Words())
    assert report.plain == best and report.target_before.value == 1 and not report.caveat
    typos = [one.candidate.prompt for one in report.findings if one.candidate.family == "misspelling"]
    assert typos and all(text.startswith(shown) for text in typos)
    assert best[0] not in {one.candidate.prompt for one in report.findings}, "it is measured beside the candidates"
    pictures = typical_pictures(Deaf(), style, SETTINGS)
    assert pictures.shape == (SETTINGS.plain, 4, 4, 3), "every plain prompt once"


def test_a_scan_that_sees_nothing_says_so():

    def green(images: np.ndarray) -> np.ndarray:
        return (images[:, 0, 0, 1] / 255 - images[:, 0, 0, 0] / 255) - 0.5

    report = scan(Painter(), blocking(), ROOSTER, green, SETTINGS, WORDS)
    assert not report.leaks and report.caveat.startswith("Only 0% of the target's own pictures before the edit")


def test_nothing_stays_attached_when_the_user_cancels_in_the_middle():
    painter = Painter()

    def cancel(progress: object) -> None:
        if progress.phase == "Drawing all prompts after":
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        scan(painter, blocking("rooster"), ROOSTER, lambda images: images[:, 0, 0, 0], SETTINGS, WORDS, cancel)
    assert not painter.network._forward_hooks


def test_a_delta_of_another_model_is_refused_before_anything_is_drawn():
    drawn = []
    other = Delta({"lora_unet_other": LayerDelta(torch.zeros(3, 3))})
    with pytest.raises(IncompatibleDelta):
        scan(Painter(), other, ROOSTER, lambda images: images[:, 0, 0, 0], SETTINGS, WORDS, drawn.append)
    assert drawn == []


def test_what_a_host_cannot_give_is_said_and_not_fatal():
    report = scanned(blocking("rooster"))
    assert any(text.startswith("token: painter has no layers") for text in report.not_tried)
    assert {one.candidate.family for one in report.findings} == {
        "category",
        "synonym",
        "misspelling",
        "style",
        "composed",
    }


@pytest.mark.parametrize(
    "concept",
    [
        ROOSTER,
        Concept("Grumpy Cat", "cat"),
        Concept("Van Gogh", "painting", "style"),
        Concept("A woman holds an umbrella in Paris, 1925", "a portrait of a woman", "memorized"),
    ],
)
def test_candidates_are_new_distinct_and_name_the_target_or_are_described(tiny, concept):
    made, not_tried = candidates(tiny, concept, WORDS, each=5)
    assert not_tried == ()
    prompts = [normalise(one.prompt) for one in made]
    assert len(set(prompts)) == len(prompts)
    families = [one.family for one in made]
    assert set(families) == {"category", "synonym", "misspelling", "style", "composed", "token"}
    assert all(families.count(family) <= 5 for family in families)
    seen = {normalise(pair.target) for pair in pairs(concept, BUILT_IN)}
    held_out = {normalise(text) for text in evaluation_prompts(concept.target, concept, BUILT_IN)}
    assert not set(prompts) & (seen | held_out)
    for one in made:
        assert normalise(one.name) in normalise(one.prompt)
        assert "{" not in one.prompt + one.anchor_prompt
        assert normalise(concept.target) not in normalise(one.anchor_prompt)
    typos = [one.name for one in made if one.family == "misspelling"]
    assert all(edit_distance(concept.target, typo) == 1 for typo in typos)


def test_anchor_prompts_say_the_same_of_the_anchor(tiny):
    made, _ = candidates(tiny, ROOSTER, Words(synonyms=("owl",)), each=3)
    assert Candidate("an owl and a child", "composed", "owl", "a bird and a child") in made
    styled, _ = candidates(tiny, Concept("Van Gogh", "painting", "style"), Words(), each=3)
    for one in styled:
        if one.family == "style":
            assert one.prompt.startswith(one.anchor_prompt) and "painting" in one.anchor_prompt
    assert plain_prompts(ROOSTER, BUILT_IN) == (("a rooster", "a bird"),)


def test_nearest_words_are_those_of_the_highest_cosine(tiny):
    table = tiny.text_network.get_input_embeddings().weight
    wanted, near, nearer, fragment = (tiny.tokenize(word) for word in ("rooster", "castle", "violin", "ro"))
    assert all(len(ids) == 1 for ids in (near, nearer, fragment))
    with torch.no_grad():
        vector = table[wanted].mean(dim=0)
        side = torch.zeros_like(vector)
        side[0] = vector.norm()
        table[near[0]] = 3 * (vector + 0.2 * side)
        table[nearer[0]] = 0.1 * (vector + 0.1 * side)
        table[fragment[0]] = vector
    assert nearest_words(tiny, "rooster", 2) == ("violin", "castle")


def test_words_that_share_a_row_are_no_neighbours(tiny):
    table = tiny.text_network.get_input_embeddings().weight
    same = [tiny.tokenize(word)[0] for word in ("castle", "violin")]
    with torch.no_grad():
        table[same] = table[tiny.tokenize("rooster")].mean(dim=0)
    assert not {"castle", "violin"} & set(nearest_words(tiny, "rooster", 20))


def test_hints_give_the_category_and_its_members():
    hints = {"rooster": "bird", "owl": "bird", "Penguin": "bird", "cat": "animal"}
    assert words_from_categories("Rooster", hints) == Words(categories=("bird",), neighbours=("owl", "Penguin"))
    assert words_from_categories("dragon", hints) == Words()


def test_a_picture_of_neither_counts_only_without_typical_ones_of_the_target():
    def flat(*colour: int) -> np.ndarray:
        return np.full((1, 2, 2, 3), colour, dtype=np.uint8)

    reddish, red, blue = flat(255, 230, 225), flat(255, 0, 0), flat(0, 0, 255)
    loose, strict = (by_judge(ColourJudge(), ROOSTER, typical=typical) for typical in (None, red))
    assert (loose(reddish) > 0).tolist() == [True] and (strict(reddish) > 0).tolist() == [False]
    assert strict(red).tolist() == [0.5] and strict(blue).tolist() == [-1.5]
    assert by_judge(ColourJudge(), ROOSTER, typical=blue)(red).tolist() == [1]
    assert by_judge(ColourJudge(), ROOSTER, ["owl", "Rooster"])(flat(9, 12, 0))[0] == pytest.approx(-0.2)


def test_copies_are_recognised_by_their_similarity_above_the_threshold():
    class Detector:
        def similarities(self, images: np.ndarray, originals: np.ndarray) -> Tensor:
            return torch.tensor([[0.1, 0.75], [0.25, 0.0]])

    margins = by_copies(Detector(), np.zeros((2, 1, 1, 3)))(np.zeros((2, 1, 1, 3)))
    assert margins.tolist() == [0.25, -0.25]


def test_the_report_is_written_whole(tmp_path):
    report = scanned(blocking("rooster"))
    path = write_leak_report(tmp_path / "scan", report)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["leaks"] == len(report.leaks) and content["target"] == "rooster"
    assert content["findings"][0]["prompt"] == report.findings[0].candidate.prompt
    assert {"anchor": "a bird", "target": "a cockerel"} in content["further_target_prompts"]
    with Image.open(tmp_path / "scan" / "leaks.png") as sheet:
        assert sheet.size == contact_sheet(report).size
    assert sorted(file.name for file in path.parent.iterdir()) == ["leaks.json", "leaks.png"]


def test_a_scan_leaves_nothing_of_an_earlier_one(tmp_path):
    found, none = scanned(blocking("rooster")), replace(scanned(blocking("rooster")), findings=())
    assert len(write_leaks(tmp_path, found)) > 0 and write_feed_back(tmp_path / "more.txt", found) > 0
    assert write_leaks(tmp_path, none) == [] and write_feed_back(tmp_path / "more.txt", none) == 0
    # a file that was fed back already is the user's
    assert sorted(file.name for file in tmp_path.iterdir()) == ["leaks.json", "more.txt"]


def test_settings_are_checked():
    with pytest.raises(AblationError, match="at least one"):
        ScanSettings(seeds=0)


def test_an_edit_of_zeros_finds_the_same_before_and_after_on_the_embedded_model(emoji):
    words = words_from_categories("rooster", load_hints(EMBEDDED_MODEL).categories)
    assert words.neighbours
    settings = ScanSettings(each=1, seeds=1, suspects=1, more_seeds=2, pictures=9, sample=SampleSettings(steps=3))
    typical = typical_pictures(emoji, ROOSTER, settings)
    assert typical.shape == (2, 128, 128, 3)
    recognise = by_judge(Judge.load(), ROOSTER, words.neighbours, typical)
    report = scan(emoji, zeros(select("cross-attn", emoji)), ROOSTER, recognise, settings, words)
    # a category that is the anchor is tried, but gives no pair to train on
    assert "a bird" in {one.candidate.prompt for one in report.findings}
    for one in report.findings:
        assert one.before == one.after
        assert np.array_equal(one.images_before, one.images_after)
    assert all(pair.anchor != pair.target for pair in further_target_prompts(report))
    assert not any(module._forward_hooks for module in emoji.network.modules())
