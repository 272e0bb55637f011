"""The pack in a real ComfyUI server: it is imported, every node says what its inputs are, stock graphs still run."""

from __future__ import annotations

import pytest

from concept_ablation.tests.comfyui.graph import Graph, sample
from concept_ablation.tests.comfyui.server import PACK, ROOT

NODES = {
    "ConceptAblationConcept": ["CONCEPT"],
    "ConceptAblationBuildDataset": ["ABLATION_DATASET", "IMAGE"],
    "ConceptAblationAblate": ["MODEL", "CLIP", "ABLATION_DELTA", "IMAGE"],
    "ConceptAblationInstant": ["MODEL", "CLIP", "ABLATION_DELTA"],
    "ConceptAblationEvaluate": ["IMAGE", "STRING", "STRING"],
    "ConceptAblationScanForLeaks": ["IMAGE", "STRING"],
    "ConceptAblationFindAnchors": ["CONCEPT", "STRING"],
    "ConceptAblationSaveDelta": ["STRING"],
    "ConceptAblationLoadDelta": ["MODEL", "CLIP", "ABLATION_DELTA"],
    "ConceptAblationApplyDelta": ["MODEL", "CLIP"],
    "ConceptAblationMergeDeltas": ["ABLATION_DELTA"],
    "ConceptAblationToLora": ["ABLATION_DELTA", "STRING"],
    "ConceptAblationLoadEmojiDiffusion": ["MODEL", "CLIP", "VAE"],
}
WEB = ROOT / "web" / "comfyui"


@pytest.fixture(scope="module")
def info(client):
    return {name: node for name, node in client.object_info().items() if node["python_module"].endswith(PACK)}


def test_the_server_lists_every_node_of_the_pack(info, server):
    assert {name: node["output"] for name, node in info.items()} == NODES
    assert {node["category"] for node in info.values()} == {"concept ablation"}
    assert "IMPORT FAILED" not in server.log


def test_every_input_has_a_tooltip_and_every_number_bounds(info):
    wrong = []
    for name, node in info.items():
        for key, (kind, options) in {**node["input"].get("required", {}), **node["input"].get("optional", {})}.items():
            bounded = kind not in ("INT", "FLOAT") or {"min", "max", "default"} <= options.keys()
            if len(options.get("tooltip", "")) < 10 or not bounded:
                wrong.append((name, key))
        wrong += [
            (name, output) for output, tip in zip(node["output_name"], node["output_tooltips"], strict=True) if not tip
        ]
    assert not wrong
    assert all(node["description"] and node["display_name"] for node in info.values())


def test_the_server_gives_the_front_end_our_scripts_and_help_pages(client, info):
    extensions = [path for path in client.json("/extensions") if f"/{PACK}/" in path]
    scripts = [path.relative_to(WEB).as_posix() for path in WEB.rglob("*.js")]
    assert sorted(extensions) == sorted(f"/extensions/{PACK}/{path}" for path in scripts)
    for name in info:
        assert len(client.get(f"/extensions/{PACK}/docs/{name}.md")) > 100


def test_a_stock_graph_runs(client, sd15):
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    drawn = sample(graph, loader[0], loader[1], "a fish", images=2, size=64, steps=2)
    shown = graph.add("PreviewImage", images=graph.add("VAEDecode", samples=drawn, vae=loader[2]))
    run = client.run(graph)
    assert run.status == "success"
    assert client.pictures(run, shown.id).shape == (2, 64, 64, 3)
    assert [value for node, value, _ in run.bars if node == drawn.id] == [1, 2]
