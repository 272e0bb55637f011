"""Tests of the nodes, collected by `test_nodes.py` only: they need ComfyUI's modules on the path."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from server import PromptServer

import concept_ablation
from concept_ablation.core.ablation import Task
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import AblationDataset, DatasetSettings, Plan
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.nodes import NODES, ablate, dataset, evaluate, leaks, paths
from concept_ablation.nodes.concept import ConceptAblationConcept, names
from concept_ablation.nodes.emoji import ConceptAblationLoadEmojiDiffusion

NAMES = {
    "ConceptAblationConcept": "Concept to Ablate",
    "ConceptAblationBuildDataset": "Build Ablation Dataset",
    "ConceptAblationAblate": "Ablate Concept",
    "ConceptAblationInstant": "Ablate Concept (instant)",
    "ConceptAblationEvaluate": "Evaluate Ablation",
    "ConceptAblationScanForLeaks": "Scan for Leaks",
    "ConceptAblationFindAnchors": "Find Anchors of Memorized Image",
    "ConceptAblationSaveDelta": "Save Ablation Delta",
    "ConceptAblationLoadDelta": "Load Ablation Delta",
    "ConceptAblationApplyDelta": "Apply Ablation Delta",
    "ConceptAblationMergeDeltas": "Merge Ablation Deltas",
    "ConceptAblationToLora": "Ablation Delta → LoRA",
    "ConceptAblationLoadEmojiDiffusion": "Load Emoji Diffusion",
}
FISH = Task(Concept("tropical fish", "fish"), ("shark",))


def run(node: type[io.ComfyNode], **inputs: object) -> io.NodeOutput:
    """Execute a node as the executor does, with its defaults for every widget that is not given."""
    schema = node.GET_SCHEMA()
    widgets = {item.id: item.default for item in schema.inputs if isinstance(item, io.WidgetInput)}
    hidden = {io.Hidden.unique_id: "7", io.Hidden.prompt: {"7": {}}, io.Hidden.extra_pnginfo: {"workflow": {"id": "w"}}}
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(hidden).EXECUTE_NORMALIZED(**{**widgets, **inputs})


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """ComfyUI's folders, in a temporary one."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    loras = tmp_path / "models" / "loras"
    loras.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors", ".pt"}))
    return SimpleNamespace(root=tmp_path, loras=loras, output=tmp_path / "output")


@pytest.fixture
def sent(monkeypatch):
    """What goes out over the websocket."""
    messages = []
    server = SimpleNamespace(
        client_id="me",
        send_sync=lambda *message: messages.append(message),
        send_progress_text=lambda *message: messages.append(message),
    )
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    return messages


# The schema is the documentation.


def test_comfyui_gets_every_node():
    extension = concept_ablation.comfy_entrypoint()
    schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    assert {schema.node_id: schema.display_name for schema in schemas} == NAMES
    assert {schema.category for schema in schemas} == {"concept ablation"}
    assert all(schema.description for schema in schemas)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_input_says_what_it_is_and_how_far_it_goes(node):
    schema = node.GET_SCHEMA()
    assert node.__name__ == schema.node_id
    for item in [*schema.inputs, *schema.outputs]:
        assert item.tooltip, item.id
    for item in schema.inputs:
        if isinstance(item, io.Int.Input | io.Float.Input):
            assert item.min <= item.default <= item.max <= 2**53 - 1, item.id
        if isinstance(item, io.Float.Input):
            assert item.step, item.id
        if isinstance(item, io.Combo.Input) and item.id != "file":
            assert item.default in item.options, item.id
        if item.id == "seed":
            # the front end would pick a new seed for each run, and so empty the cache
            assert item.control_after_generate is False


# Concepts.


def test_names_are_separated_by_commas_and_lines():
    assert names(" blowfish, shark\n octopus ,,\n") == ("blowfish", "shark", "octopus")


def test_concepts_are_chained():
    first = run(ConceptAblationConcept, target="twemoji", anchor="emoji", kind="style")[0]
    second = run(ConceptAblationConcept, surrounding="shark", prompts="a fish\n\na red fish", concepts=first)[0]
    assert second == (
        Task(Concept("twemoji", "emoji", "style")),
        Task(Concept("tropical fish", "fish", anchor_prompts=("a fish", "a red fish")), ("shark",)),
    )


def test_captions_of_a_memorized_image():
    task = run(ConceptAblationConcept, target="a b", anchor="c d", kind="memorized", captions="a b 2\na b 3")[0][0]
    assert task.concept.target_prompts == ("a b 2", "a b 3")


def test_a_target_twice_is_refused():
    first = run(ConceptAblationConcept)[0]
    with pytest.raises(AblationError, match="named twice"):
        run(ConceptAblationConcept, target="Tropical Fish", concepts=first)


# Files.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("van gogh", "van_gogh"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\Windows\\x", "C_Windows_x"),
        ("絵画 v1.5", "絵画_v1.5"),
        ("..", "default"),
        ("\x00/\n", "default"),
        ("a" * 500, "a" * 60),
    ],
)
def test_safe_names(text, name):
    assert paths.safe_name(text, "default") == name


def test_numbers_go_up(tmp_path):
    assert paths.numbered(tmp_path / "new", "x") == tmp_path / "new" / "x_00001"
    for name in ("x_00001.safetensors", "x_00007.safetensors", "x_y_00009.safetensors", "x_00011.txt"):
        (tmp_path / name).touch()
    assert paths.numbered(tmp_path, "x", ".safetensors").name == "x_00008.safetensors"


def test_the_number_of_a_deleted_file_is_not_given_again(tmp_path):
    """Load LoRA keeps its last file by the path: it gave the deleted edit."""
    for number in (1, 2):
        path = paths.numbered(tmp_path, "x", ".safetensors")
        assert path.name == f"x_0000{number}.safetensors"
        path.touch()
        path.unlink()
    assert paths.numbered(tmp_path, "x").name == "x_00001", "another suffix is another file"


def small_delta() -> Delta:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 6, generator=generator).half().float()
    return Delta({"lora_unet_a": LayerDelta(weight)}, {"concept_ablation.target": "fish"})


# Datasets.


def make_dataset(rows: tuple[tuple[int, int], ...], prompts: tuple[str, ...] = ("a", "b", "c")) -> AblationDataset:
    latents = torch.zeros(len(rows), 4, 8, 12)
    return AblationDataset(latents, Plan(prompts, rows), DatasetSettings(), (FISH.concept,), "model")


def test_the_preview_is_spread_evenly():
    assert dataset.evenly([5, 6, 7], 16) == [5, 6, 7]
    assert dataset.evenly(range(100, 132), 4) == [100, 108, 116, 124]


def test_the_folder_of_a_dataset_follows_all_that_it_is_made_of(make_model):
    denoiser, settings = make_model(), DatasetSettings(images=4, prompts=4)
    other_size = make_model()
    other_size.latent_shape = (4, 8, 16)
    variants = [
        dataset.identity(denoiser, [FISH], settings),
        dataset.identity(make_model(seed=1), [FISH], settings),
        dataset.identity(other_size, [FISH], settings),
        dataset.identity(denoiser, [replace(FISH, concept=Concept("tropical fish", "animal"))], settings),
        dataset.identity(denoiser, [replace(FISH, surrounding=("cat",))], replace(settings, preserve=2)),
        dataset.identity(denoiser, [FISH], replace(settings, preserve=2)),
        dataset.identity(denoiser, [FISH], replace(settings, seed=1)),
        dataset.identity(denoiser, [FISH], replace(settings, sample=SampleSettings(steps=7))),
    ]
    assert len(set(variants)) == len(variants)
    assert variants[0] == dataset.identity(make_model(), [FISH], settings)
    assert all(len(name) == 16 for name in variants)


def test_the_size_of_a_dataset():
    assert dataset.size_of(make_dataset(((0, 1),))) == (96, 64)


def test_thumbnails_show_distinct_prompts_of_the_target():
    rows = ((0, 1), (2, 2), (0, 1), (0, 2))
    assert ablate.thumbnail_prompts(make_dataset(rows)) == ["b", "c", "b", "c"]


def test_a_dataset_of_another_model_is_refused(make_model):
    denoiser = make_model()
    with pytest.raises(AblationError, match="drawn by another model"):
        ablate.check_drawn_by(make_dataset(((0, 1),)), denoiser)
    ablate.check_drawn_by(replace(make_dataset(((0, 1),)), model=denoiser.fingerprint()), denoiser)


# Evaluation.


def test_exactly_one_edit_is_measured():
    with pytest.raises(AblationError, match="either delta or model_after"):
        evaluate.edited("m", "c", None, None, None)
    with pytest.raises(AblationError, match="either delta or model_after"):
        evaluate.edited("m", "c", small_delta(), "after", None)
    with pytest.raises(AblationError, match="clip_after"):
        evaluate.edited("m", "c", small_delta(), None, "after")
    assert evaluate.edited("m", "c", None, "after", None) == ("after", "c")
    assert evaluate.edited("m", "c", None, "after", "text") == ("after", "text")


def test_the_judge_is_embedded_named_or_below_the_models_folder(folders, monkeypatch):
    assert evaluate.judge_source("embedded") is evaluate.judge_source(" ") is None
    assert evaluate.judge_source("ViT-B-32/laion2b_s34b_b79k") == "ViT-B-32/laion2b_s34b_b79k"
    (folders.root / "models" / "judges" / "mine").mkdir(parents=True)
    assert evaluate.judge_source("judges/mine") == folders.root / "models" / "judges" / "mine"
    for path in ("../judges", "/etc", "C:\\judges", "\\\\server\\share", "~/judges", "judges/../../x", "judges\\..\\x"):
        with pytest.raises(AblationError, match="models folder"):
            evaluate.judge_source(path)
    (folders.root / "here").mkdir()
    monkeypatch.chdir(folders.root)
    with pytest.raises(AblationError, match="models folder"):
        evaluate.judge_source("here")


# All of it, on the embedded model.


def test_from_concept_to_report(folders, sent):
    emoji, clip, vae = run(ConceptAblationLoadEmojiDiffusion).args
    concepts = run(ConceptAblationConcept, surrounding="shark")[0]
    shared = {"model": emoji, "clip": clip, "vae": vae}
    small = {"steps": 2, "width": 64, "height": 64}
    data, preview = run(
        dataset.ConceptAblationBuildDataset,
        concepts=concepts,
        images=3,
        preserve=2,
        images_at_once=2,
        **shared,
        **small,
    ).args
    assert data.latents.shape == (5, 4, 8, 8)
    assert data.settings.sample == SampleSettings(steps=2)
    assert preview.shape == (3, 64, 64, 3)
    assert preview.std() > 0.02
    assert len(list((folders.output / "concept_ablation" / "datasets").glob("*/shard-*"))) == 3

    edited, edited_clip, delta, plot = run(ablate.ConceptAblationAblate, dataset=data, steps=2, batch=2, **shared).args
    assert edited is not emoji
    assert plot.shape[0] == 1
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in delta.layers.popitem()[1].tensors())
    assert delta.metadata["concept_ablation.steps"] == "2"
    pictures = sent[-1][1]["pictures"]
    assert len(pictures["before"]) == len(pictures["after"]) == 4

    few = {"prompts": 1, "images_per_prompt": 1, "concepts": concepts, "folder": "../x"}
    reports = [
        run(evaluate.ConceptAblationEvaluate, delta=delta, **few, **shared, **small),
        run(evaluate.ConceptAblationEvaluate, model_after=edited, clip_after=edited_clip, **few, **shared, **small),
    ]
    for number, report in enumerate(reports, start=1):
        sheet, metrics, folder = report.args
        assert Path(folder) == folders.output / "concept_ablation" / f"x_0000{number}"
        assert (Path(folder) / "report.html").is_file()
        assert sheet.shape[0] == 1
        found = json.loads(metrics)
        assert [row["name"] for row in found["concepts"]] == ["tropical fish", "fish", "shark"]
        assert (found["delta"] is None) == (number == 2)
        assert "tropical fish (target):" in report.ui["text"][0]
    assert (folders.output / "concept_ablation" / "x_00001" / "delta.safetensors").is_file()

    tiny = {"each": 1, "seeds": 1, "suspects": 1, "more_seeds": 1, "synonyms": "clownfish"}
    searched = {"delta": delta, "concepts": concepts, **tiny, **shared, **small}
    sheet, prompts = run(leaks.ConceptAblationScanForLeaks, **searched).args
    assert sheet.shape[0] == 1 and isinstance(prompts, str)
    told = json.loads((folders.output / "concept_ablation" / "leaks_00001" / "leaks.json").read_text("utf-8"))
    assert told["target"] == "tropical fish" and "a clownfish" in {one["prompt"] for one in told["findings"]}
