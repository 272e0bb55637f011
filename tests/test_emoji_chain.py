"""The embedded model from nothing, by the one command that makes it: icon sets in, trained assets out, in a minute."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import icons
import pytest
import stage
import train
from pictures import load_pictures

from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.tests.emoji_shapes import SCENE, remaining_loss, tiny

MINUTES = "0.25"
# emoji, name, emojibase's group and subgroup, outline; the last two are no concepts of the model
DRAWN = (
    ("🐅", "tiger", "animals-nature", "animal-mammal", "M1 1h8v8H1z"),
    ("🐠", "tropical fish", "animals-nature", "animal-marine", "M1 5l8-4v8z"),
    ("🦉", "owl", "animals-nature", "animal-bird", "M5 0l5 10H0z"),
    ("🌹", "rose", "animals-nature", "plant-flower", "M4 0h2v10H4z"),
    ("🔨", "hammer", "objects", "tool", "M0 0h10v3H0z"),
    ("🔑", "key", "objects", "lock", "M0 4h10v2H0z"),
)
COLOURS = ("#d22", "#2d2", "#22d", "#dd2", "#d2d", "#2dd", "#d82", "#28d")


def write_package(cache: Path, package: str, files: dict[str, object]) -> None:
    """What `npm pack` would have downloaded."""
    cache.mkdir(exist_ok=True)
    with tarfile.open(cache / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz", "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode("utf-8")
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_packages(cache: Path) -> None:
    """Icon sets of six simple shapes, each in a colour of its own, and the two lists of emoji."""
    for (package, style), colour in zip(icons.SETS.items(), COLOURS, strict=True):
        drawn = {icons.slug(name): {"body": f'<path fill="{colour}" d="{outline}"/>'} for _, name, *_, outline in DRAWN}
        info = {"name": style.capitalize(), "author": {"name": "Us"}, "license": {"spdx": "MIT"}}
        write_package(cache, package, {"icons.json": {"width": 10, "height": 10, "icons": drawn}, "info.json": info})
    write_package(cache, icons.NAMES, {"data-by-emoji.json": {emoji: {"name": name} for emoji, name, *_ in DRAWN}})
    groups, subgroups = (dict(enumerate(sorted({row[column] for row in DRAWN}))) for column in (2, 3))
    numbers = {name: number for names in (groups, subgroups) for number, name in names.items()}
    emoji = [{"emoji": row[0], "group": numbers[row[2]], "subgroup": numbers[row[3]]} for row in DRAWN]
    files = {"en/data.json": emoji, "meta/groups.json": {"groups": groups, "subgroups": subgroups}}
    write_package(cache, icons.TAXONOMY, files)


def test_one_command_makes_the_model_from_nothing_within_its_minutes(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    out = tmp_path / "run"
    out.mkdir()
    write_packages(out / "npm")
    scene = replace(SCENE, icons=(("tiger", "noto"), ("rose", "noto"), ("owl", "flat")))
    settings = replace(tiny(), scenes=(scene,))
    monkeypatch.setattr(train, "Settings", lambda: settings)
    # minutes of this process: a busy machine would leave too few steps in those of the clock
    monkeypatch.setattr(stage, "time", SimpleNamespace(monotonic=time.process_time))
    monkeypatch.setattr(sys, "argv", ["train.py", "--minutes", MINUTES, "--out", str(out)])
    assert train.main() == 0

    own, others = load_pictures(out / "pictures"), load_pictures(out / train.OTHERS)
    assert [one.name for one in own.concepts] == ["tiger", "tropical fish", "owl", "rose"]
    assert [one.name for one in others.concepts] == ["hammer", "key"] and own.styles == tuple(icons.SETS.values())
    left = remaining_loss(out, settings, own, others)
    assert all(share < 0.97 for share in left.values()), left
    (log,) = json.loads((out / "model" / "training.json").read_text("utf-8"))
    assert log.keys() == left.keys()
    assert 0 < sum(one["minutes"] for one in log.values()) < 2 * float(MINUTES), log

    images = draw_images(load_denoiser(out / "model"), ["a tiger", "an owl by flat"], [1, 2], SampleSettings(steps=3))
    judge = Judge.load(out / "validation_judge" / "open_clip")
    assert images.std() > 0 and judge.embed_images(images).shape == judge.embed_texts(["a tiger", "a rose"]).shape
