"""Datasets: what the plan pairs, determinism, resuming after a kill, and folders that must be refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_ablation.core import dataset, harvest
from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.dataset import DatasetSettings, make_plan
from concept_ablation.core.errors import AblationError, Interrupted, OtherDataset
from concept_ablation.core.samplers import SampleSettings, sample_latents

CAT = Concept("grumpy cat", "cat")
SETTINGS = DatasetSettings(images=5, preserve=3, prompts=4, sample=SampleSettings(steps=2), batch=3, seed=7)


def test_plan_pairs_anchor_with_target_and_preserves_with_equal_prompts(tiny):
    plan = make_plan([CAT], [["dog"]], tiny.prompt_source, SETTINGS)
    texts = [(plan.prompts[a], plan.prompts[t]) for a, t in plan.rows]
    assert len(texts) == 8 and len(set(plan.prompts)) == len(plan.prompts)
    for anchor, target in texts[:5]:
        assert "grumpy" not in anchor and target.replace("grumpy ", "") == anchor
    assert texts[4] == texts[0], "the fifth image goes round the four prompts"
    assert all(anchor == target and "grumpy" not in anchor for anchor, target in texts[5:])
    assert any("dog" in anchor for anchor, _ in texts[5:])


def test_plan_never_uses_an_evaluation_prompt(emoji):
    settings = DatasetSettings(images=500, preserve=500, prompts=500)
    for concept, neighbour in ((Concept("rooster", "bird"), "owl"), (Concept("twemoji", "emoji", "style"), "noto")):
        plan = make_plan([concept], [[neighbour]], emoji.prompt_source, settings)
        for name in (concept.target, concept.anchor, neighbour):
            held_out = set(evaluation_prompts(name, concept, emoji.prompt_source))
            assert held_out and not held_out & set(plan.prompts)


def test_several_concepts_are_the_union(tiny):
    other = Concept("van gogh", "painting", "style")
    both = make_plan([CAT, other], [[], []], tiny.prompt_source, SETTINGS)
    alone = [make_plan([concept], [[]], tiny.prompt_source, SETTINGS) for concept in (CAT, other)]

    def texts(plan):
        return [(plan.prompts[a], plan.prompts[t]) for a, t in plan.rows]

    assert texts(both) == texts(alone[0]) + texts(alone[1])


def test_what_one_concept_keeps_is_not_what_another_one_removes(emoji):
    concepts = (Concept("rooster", "bird"), Concept("noto", "emoji", "style"))
    settings = DatasetSettings(images=64, preserve=96)
    plan = make_plan(concepts, [("owl", "duck"), ()], emoji.prompt_source, settings)
    anchors = [plan.prompts[anchor] for anchor, _ in plan.rows]
    assert len(anchors) == 2 * (64 + 96)
    assert not [prompt for prompt in anchors if "noto" in prompt.split() or "rooster" in prompt.split()]


def test_rows_are_what_the_sampler_draws_and_the_batch_size_does_not_matter(tiny):
    data = dataset.build(tiny, [CAT], SETTINGS)
    again = dataset.build(tiny, [CAT], replace(SETTINGS, batch=4))
    torch.testing.assert_close(data.latents, again.latents, atol=2e-3, rtol=2e-3)
    row = 2
    prompt = data.plan.prompts[data.plan.rows[row][0]]
    drawn = sample_latents(tiny, [prompt], [dataset._row_seed(7, row)], SETTINGS.sample)
    torch.testing.assert_close(data.latents[row : row + 1], drawn, atol=2e-3, rtol=2e-3)
    assert data.preserving.tolist() == [False] * 5 + [True] * 3


def test_target_images_are_drawn_from_the_target_prompt(tiny):
    data = dataset.build(tiny, [CAT], replace(SETTINGS, source="target"))
    prompt = data.plan.prompts[data.plan.rows[0][1]]
    drawn = sample_latents(tiny, [prompt], [dataset._row_seed(7, 0)], SETTINGS.sample)
    assert "grumpy" in prompt
    torch.testing.assert_close(data.latents[:1], drawn, atol=2e-3, rtol=2e-3)


def test_a_dataset_is_deterministic_and_survives_its_files(tiny, tmp_path):
    memory = dataset.build(tiny, [CAT], SETTINGS, surrounding=[["dog"]])
    stored = dataset.build(tiny, [CAT], SETTINGS, surrounding=[["dog"]], directory=tmp_path)
    loaded = dataset.load(tmp_path)
    assert memory.digest() == stored.digest() == loaded.digest()
    assert torch.equal(memory.latents, loaded.latents)
    assert (loaded.plan, loaded.settings, loaded.concepts) == (memory.plan, memory.settings, memory.concepts)
    assert loaded.model == tiny.fingerprint()
    other = dataset.build(tiny, [CAT], replace(SETTINGS, seed=8), surrounding=[["dog"]])
    assert other.digest() != memory.digest()


def test_a_finished_dataset_is_not_drawn_again_but_damaged_shards_are(tiny, tmp_path):
    first = dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "shard-00001.safetensors").write_bytes(b"half a sha")
    second = dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path)
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"shard-00001.safetensors"}
    assert first.digest() == second.digest()


def test_progress_shows_what_each_batch_is_becoming(tiny):
    seen = []
    data = dataset.build(tiny, [CAT], SETTINGS, on_progress=lambda progress: seen.append(progress.latents.clone()))
    steps = SETTINGS.sample.steps
    # the last estimate of a batch is the batch
    last = torch.cat(seen[steps - 1 :: steps])
    torch.testing.assert_close(last, data.latents, atol=2e-2, rtol=1e-2)


def test_cancelling_keeps_whole_shards_only(tiny, tmp_path):
    def cancel(progress):
        if progress.step == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path, on_progress=cancel)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    with pytest.raises(AblationError, match="not finished"):
        dataset.load(tmp_path)


def test_a_build_killed_in_the_middle_ends_with_the_same_dataset(make_model, tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from concept_ablation.core import dataset
        from conftest import make_tiny
        from test_dataset import CAT, SETTINGS
        dataset.build(make_tiny(), [CAT], SETTINGS, directory=Path(sys.argv[1]),
                      on_progress=lambda progress: time.sleep(0.2 if progress.step > 2 else 0))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not (tmp_path / "shard-00000.safetensors").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    shards = len(list(tmp_path.glob("shard-*.safetensors")))
    assert 1 <= shards < 3, "it was killed in the middle"
    resumed = dataset.build(make_model(), [CAT], SETTINGS, directory=tmp_path)
    assert resumed.digest() == dataset.build(make_model(), [CAT], SETTINGS).digest()


def test_a_folder_with_another_dataset_is_refused_and_left_alone(tiny, make_model, tmp_path):
    dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path)
    before = load_file(tmp_path / "shard-00000.safetensors")["latents"]
    for other in (
        lambda: dataset.build(tiny, [Concept("lion", "cat")], SETTINGS, directory=tmp_path),
        lambda: dataset.build(tiny, [CAT], replace(SETTINGS, seed=1), directory=tmp_path),
        lambda: dataset.build(make_model(seed=1), [CAT], SETTINGS, directory=tmp_path),
    ):
        with pytest.raises(AblationError, match="another folder"):
            other()
    assert torch.equal(load_file(tmp_path / "shard-00000.safetensors")["latents"], before)


def test_a_folder_of_another_setup_is_refused(tiny, make_model, tmp_path):
    """The weights are the same, and what is drawn with them is not."""
    dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path)
    sampled, sized = make_model(), make_model()
    sampled.sigmas = sampled.sigmas / 2
    sized.latent_shape = (4, 16, 16)
    for other in (sampled, sized):
        assert other.fingerprint() == tiny.fingerprint()
        with pytest.raises(OtherDataset, match="another folder"):
            dataset.build(other, [CAT], SETTINGS, directory=tmp_path)


def test_missing_and_damaged_datasets_say_so(tiny, tmp_path):
    with pytest.raises(AblationError, match="no dataset"):
        dataset.load(tmp_path / "nowhere")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "app"}', encoding="utf-8")
    for load in (dataset.load, harvest.load):
        with pytest.raises(AblationError, match="holds no"):
            load(tmp_path / "app")
    dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path)
    save_file({"something": torch.zeros(1)}, tmp_path / "shard-00001.safetensors")
    with pytest.raises(AblationError, match="damaged"):
        dataset.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(AblationError, match="damaged"):
        dataset.load(tmp_path)


def test_a_file_in_place_of_the_folder_is_one_clear_error(tiny, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(AblationError, match="Cannot write"):
        dataset.build(tiny, [CAT], SETTINGS, directory=tmp_path / "file")


def test_settings_are_checked():
    with pytest.raises(AblationError, match="at least one image"):
        DatasetSettings(images=0)
