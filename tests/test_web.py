"""The page without a browser and without gradio: the form, the saved deltas, the figures, who may come in."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from concept_ablation import cli
from concept_ablation.core import delta_file
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.tests.web.tiny import GOOD, HOSTILE, TINY
from concept_ablation.web import library, views
from concept_ablation.web.app import Access
from concept_ablation.web.form import Form, check, preset_values, suggest_anchor
from concept_ablation.web.standalone import EMBEDDED, StandaloneHost


@pytest.fixture
def deltas(tmp_path):
    """A folder with two deltas of one model and, beside them, what must not be listed."""
    folder = tmp_path / "deltas"
    folder.mkdir()
    for name, value in (("one", 1.0), ("two", 3.0)):
        header = {"concept_ablation.target": name, "concept_ablation.base_model_sha256": "m"}
        layer = LayerDelta(torch.diag(torch.tensor([value, 2.0, 1.0])))
        delta_file.save(Delta({"lora_unet_x": layer}, header), folder / f"{name}.safetensors")
    delta_file.save(Delta({"lora_unet_x": LayerDelta(torch.ones(2, 2))}), folder / "somebody-elses.safetensors")
    (folder / "evil.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'echo'\ntR.")
    (folder / "evil.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'echo'\ntR.")
    delta_file.save(Delta({"lora_unet_x": layer}, header), tmp_path / "outside.safetensors")
    return folder


# --- the form


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"target": " "}, "target", "target is empty"),
        ({"anchor": ""}, "anchor", "anchor is empty"),
        ({"anchor": "Tropical  FISH"}, "anchor", "both 'tropical fish'"),
        ({"target": "x" * 301}, "target", "301 characters; use at most 300"),
        ({"target": "x" * 100_000}, "target", "100000 characters"),
        ({"target": "fi\x00sh"}, "target", "control character"),
        ({"kind": "animal"}, "kind", "'animal'"),
        ({"preset": "best"}, "preset", "'best'"),
        ({"objective": "magic"}, "objective", "objective 'magic'"),
        ({"subset": "brain"}, "subset", "subset 'brain'"),
        ({"surrounding": "cat, Fish"}, "surrounding", "'Fish' is the target or the anchor"),
        ({"surrounding": "cat, tropical fish"}, "surrounding", "'tropical fish'"),
        ({"steps": "many"}, "steps", "must be a whole number, not 'many'"),
        ({"steps": "0"}, "steps", "at least one step"),
        ({"steps": "9" * 5000}, "steps", "whole number"),
        ({"rate": "nan"}, "rate", "positive number"),
        ({"batch": "0"}, "batch", "batch"),
        ({"images": "-1"}, "images", "at least one image"),
        ({"sampling": "0"}, "sampling", "at least 1, not 0"),
        ({"eval_prompts": "0"}, "eval_prompts", "at least one prompt"),
        ({"seed": "-1"}, "seed", "from 0"),
        ({"guidance": "-1"}, "guidance", "at least 0"),
        ({"guidance": "1", "objective": "noise"}, "guidance", "asks no frozen model"),
        ({"guidance": "1", "preset": "paper"}, "guidance", "asks no frozen model"),
        ({"neighbours": "-1"}, "neighbours", "at least 0"),
        ({"neighbours": "3", "preset": "paper"}, "neighbours", "preserves nothing"),
        ({"kind": "memorized", "preset": "fast"}, "preset", "choose the preset balanced"),
        ({"steps": "3", "preset": "instant"}, "steps", "no steps"),
        ({"preserve": "3", "preset": "instant"}, "preserve", "no preserve"),
        ({"subset": "attn", "preset": "instant"}, "subset", "not the subset 'attn'"),
        ({"objective": "noise", "preset": "fast"}, "objective", "objective 'model' only"),
        ({"prompts": "a picture of a dog"}, "prompts", "lacks the anchor"),
        ({"prompts": "a fish " * 20_000}, "prompts", "use at most 1,000"),
        ({"model": ""}, "model", "No model"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(change, field, message):
    request, errors = check(replace(GOOD, **change))
    assert request is None and list(errors) == [field] and message in errors[field]
    assert len(errors[field]) < 700


def test_every_wrong_field_has_its_own_message():
    _, errors = check(Form(model="", target="", anchor="", steps="x", seed="y"))
    assert set(errors) == {"model", "target", "anchor", "steps", "seed"}


def test_a_good_form_becomes_a_request():
    form = replace(
        TINY, surrounding=" cat,\n shark ,", rate="1e-3", seed="5", objective="noise", prompts="a fish\n\na red fish"
    )
    request, errors = check(form)
    assert errors == {}
    assert request.task.surrounding == ("cat", "shark") and request.task.concept.anchor_prompts == (
        "a fish",
        "a red fish",
    )
    assert request.training == {"steps": 4, "learning_rate": 1e-3, "batch": 1}
    assert request.dataset == {"images": 2, "preserve": 1}
    assert (request.objective, request.subset, request.seed) == ("noise", None, 5)
    assert (request.evaluation.prompts, request.evaluation.seeds, request.evaluation.sample.steps) == (1, 1, 2)


def test_a_memorized_picture_is_read_and_its_anchor_may_be_left_to_the_search(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
    form = replace(TINY, kind="memorized", target="a red caption", anchor="", original=str(tmp_path / "red.png"))
    request, errors = check(replace(form, misspellings="4", composition=True))
    assert errors == {} and request.find_anchors and request.original.shape == (3, 4, 3)
    assert (request.evaluation.misspellings, request.evaluation.composition) == (4, True)
    assert set(check(replace(form, captions="a red one", misspellings="201"))[1]) == {"captions", "misspellings"}
    request, errors = check(replace(form, anchor="a blue caption"))
    assert errors == {} and not request.find_anchors and request.task.concept.anchor == "a blue caption"
    assert set(check(replace(form, original=None))[1]) == {"anchor"}
    assert set(check(replace(form, original=str(tmp_path / "none.png")))[1]) == {"original", "anchor"}
    # a picture that was uploaded for another kind is hidden, and has no say
    request, _ = check(replace(form, kind="instance", target="shark", anchor="fish"))
    assert request.original is None


@pytest.mark.parametrize(
    ("target", "kind", "anchor"),
    [
        ("Grumpy Cat", "instance", "cat"),
        ("tropical  fish!", "instance", "fish"),
        ("R2D2", "instance", ""),
        ("", "instance", ""),
        ("Van Gogh", "style", "painting"),
        ("", "style", ""),
        ("a photo of the Mona Lisa", "memorized", ""),
    ],
)
def test_the_anchor_is_suggested_from_the_words_alone(target, kind, anchor):
    assert suggest_anchor(target, kind, "painting") == anchor


def test_the_anchor_of_a_concept_that_the_model_knows_is_its_category():
    known = {"rooster": "bird", "tropical fish": "fish", "bird": "bird"}
    assert suggest_anchor(" Rooster ", "instance", "painting", known) == "bird"
    assert suggest_anchor("bird", "instance", "painting", known) == ""
    assert suggest_anchor("rooster", "style", "painting", known) == "painting"
    assert suggest_anchor("Grumpy Cat", "instance", "painting", known) == "cat"


def test_a_models_folder_says_what_its_concepts_are(tmp_path):
    hints = tmp_path / "ablation_hints.json"
    hints.write_text('{"learning_rate_scale": 2, "medium": "photo", "categories": {"rose": "flower"}}', "utf-8")
    host, closed = StandaloneHost(tmp_path), StandaloneHost(tmp_path, free_model=False)
    assert (host.style_anchor(str(tmp_path)), host.categories(str(tmp_path))) == ("photo", {"rose": "flower"})
    assert closed.categories(str(tmp_path)) == {}, "a page that is open to others looks into no folder of their choice"
    hints.write_text("{", "utf-8")
    assert host.categories(str(tmp_path)) == {} and host.style_anchor("some/hub-id") == "painting"
    assert host.style_anchor(EMBEDDED) == "emoji" and host.categories(EMBEDDED)["rooster"] == "bird"


def test_the_hints_are_the_presets_own_values():
    assert preset_values("balanced", "instance")["steps"] == "100"
    assert preset_values("instant", "instance")["steps"] == "none"
    assert preset_values("fast", "style")["images"] == "12"
    assert set(preset_values("fast", "memorized").values()) == {""}
    assert preset_values("paper", "memorized") | {"steps": "800", "images": "1000"} == preset_values(
        "paper", "memorized"
    )


# --- the saved deltas


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Grumpy Cat to cat", "Grumpy-Cat-to-cat"),
        ("../../etc/passwd", "etc-passwd"),
        ("..\\..\\windows\\system32", "windows-system32"),
        ("/abs/olute", "abs-olute"),
        ("C:\\x", "C-x"),
        ("a\x00b", "a-b"),
        (".hidden", "hidden"),
        ("....", "delta"),
        ("", "delta"),
        ("x.safetensors", "x"),
        ("CON", "delta-CON"),
        ("lpt1.txt", "delta-lpt1.txt"),
        ("熊猫", "熊猫"),
        ("a:1>,<lora:b", "a-1-lora-b"),
        ("x" * 300, "x" * 80),
        ("熊" * 90, "熊" * 60),
        (HOSTILE, "img-src-x-onerror-window.hacked-1"),
    ],
)
def test_a_name_becomes_a_file_name_that_stays_in_its_folder(text, name, tmp_path):
    assert library.safe_name(text) == name
    path = library.save_new(Delta({"lora_unet_x": LayerDelta(torch.ones(2, 2))}), tmp_path, text)
    assert path.parent == tmp_path and [item.name for item in tmp_path.iterdir()] == [path.name]


def test_only_our_own_readable_files_are_listed(deltas):
    assert {item.file for item in library.saved(deltas)} == {"one.safetensors", "two.safetensors"}
    assert library.find(deltas, "one.safetensors").field("target") == "one"
    assert library.saved(deltas / "nowhere") == []


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "evil.pt", "evil.safetensors", "somebody-elses.safetensors", "/etc/passwd", "", None],
)
def test_no_other_file_can_be_reached(file, deltas):
    if file == "../outside.safetensors":
        assert (deltas / file).is_file()
    for act in (library.find, library.delete, lambda folder, name: library.export_lora(folder, name, 1)):
        with pytest.raises(AblationError, match=r"no saved delta|No delta is chosen"):
            act(deltas, file)
    with pytest.raises(AblationError, match=r"no saved delta|No delta is chosen"):
        library.merge_saved(deltas, [("one.safetensors", 1.0), (file, 1.0)], "both")
    assert len(list(deltas.iterdir())) == 5 and (deltas.parent / "outside.safetensors").is_file()


def test_a_merge_is_the_weighted_sum_and_never_overwrites(deltas):
    parts = [("one.safetensors", 0.5), ("two.safetensors", -1.0)]
    paths = [library.merge_saved(deltas, parts, "../both") for _ in range(2)]
    assert [path.name for path in paths] == ["both.safetensors", "both-2.safetensors"]
    merged = delta_file.load(paths[0])
    assert torch.equal(merged.layers["lora_unet_x"].weight, torch.diag(torch.tensor([-2.5, -1.0, -0.5])))
    assert library.find(deltas, "both.safetensors").field("merged") == "one x 0.5; two x -1"
    with pytest.raises(AblationError, match="at least two"):
        library.merge_saved(deltas, parts[:1], "both")
    with pytest.raises(AblationError, match="finite"):
        library.merge_saved(deltas, [parts[0], ("two.safetensors", float("nan"))], "both")


def test_a_lora_keeps_the_largest_directions(deltas):
    path, kept = library.export_lora(deltas, "two.safetensors", 2)
    # singular values 3, 2, 1
    assert kept == pytest.approx(13 / 14) and path.name == "two-rank2.safetensors"
    weight = delta_file.load(path).layers["lora_unet_x"].weight
    assert torch.allclose(weight.dense(), torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-2)


def test_the_name_of_a_deleted_delta_is_not_given_to_another_one(deltas):
    """Forge's cache of LoRAs goes by the path: it gave the deleted edit."""
    delta = delta_file.load(deltas / "one.safetensors")
    first = library.save_new(delta, deltas, "mine")
    first.unlink()
    library.delete(deltas, "two.safetensors")
    assert library.save_new(delta, deltas, "mine").name == "mine-2.safetensors"
    assert library.save_new(delta, deltas, "two").name == "two-2.safetensors"


def test_two_that_save_under_one_name_at_once_get_two_files(tmp_path, monkeypatch):
    save = delta_file.save

    def slowly(delta, path):
        time.sleep(0.05)
        save(delta, path)
        time.sleep(0.05)

    monkeypatch.setattr(delta_file, "save", slowly)
    saved = {}

    def work(value):
        saved[value] = library.save_new(Delta({"lora_unet_x": LayerDelta(torch.full((2, 2), value))}), tmp_path, "one")

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in saved.values()} == {"one.safetensors", "one-2.safetensors"}
    for value, path in saved.items():
        assert delta_file.load(path).layers["lora_unet_x"].weight[0, 0] == value


def test_a_deleted_delta_is_gone(deltas):
    library.delete(deltas, "one.safetensors")
    assert [item.file for item in library.saved(deltas)] == ["two.safetensors"]


# --- HTML


def test_the_chart_grows_with_the_steps_and_survives_thousands():
    assert views.loss_chart([], 10) == "" and views.loss_chart([float("nan")], 10) == ""
    assert "step 1 of 10" in views.loss_chart([0.5], 10)
    long = views.loss_chart([1 / step for step in range(1, 5001)], 5000)
    assert len(long) < 12_000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "less than a second"), (42, "42 s"), (300, "5 min"), (9000, "2.5 h"), (float("nan"), "a while")],
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert views.duration(seconds) == words


# --- who may come in


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (Access(listen=True), "--listen and --share open the page to others"),
        (Access(share=True), "--listen and --share open the page to others"),
        (Access(listen=True, user="me"), "both --user and --password"),
        (Access(password="12345678"), "both --user and --password"),
        (Access(share=True, user="me", password="short"), "too short"),
    ],
)
def test_an_open_page_wants_a_user_and_a_password(access, message):
    with pytest.raises(AblationError, match=message):
        access.check()


def test_a_closed_page_and_one_with_a_password_are_fine():
    closed, guarded = Access(), Access(listen=True, user="me", password="long enough")
    for access in (closed, guarded):
        access.check()
    assert not closed.open and closed.login is None
    assert guarded.open and guarded.login == ("me", "long enough")


def test_the_command_refuses_to_listen_without_a_password(monkeypatch, capsys, tmp_path):
    for name in ("CONCEPT_ABLATION_USER", "CONCEPT_ABLATION_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["concept-ablation", "ui", "--listen", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(said) == 1 and "--user and --password" in said[0]
    assert not (tmp_path / "out").exists()
