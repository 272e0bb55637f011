"""Rows are counted as they go through the network, and every recipe's count is what its settings say."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.concept import Concept
from concept_ablation.core.hosts.diffusers import DiffusersDenoiser
from concept_ablation.core.phases import Meter, counted
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings

TASK = Task(Concept("grumpy cat", "cat"), ("dog",))
DRAWN = {"images": 3, "preserve": 2, "prompts": 4, "sample": SampleSettings(steps=3), "batch": 2}
TRAINING = {"steps": 4, "batch": 2, "preserve_batch": 1}


@pytest.fixture
def seen(monkeypatch):
    """(rows, whether a gradient is wanted) of each forward pass of any U-Net, and rows of each backward pass."""
    passes, back = [], []
    denoise = DiffusersDenoiser.denoise

    def watched(self, x, sigma, cond):
        passes.append(len(x))
        result = denoise(self, x, sigma, cond)
        if result.requires_grad:
            result.register_hook(lambda gradient: back.append(len(gradient)))
        return result

    monkeypatch.setattr(DiffusersDenoiser, "denoise", watched)
    return passes, back


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("instant", {}, {"encode": (0, 0), "closed form": (0, 0)}),
        # guided sampling: two rows a step, and a third of the target for negative guidance; training on harvested rows:
        # one forward and one backward pass
        (
            "fast",
            {"dataset": DRAWN, "training": TRAINING},
            {"encode": (0, 0), "closed form": (0, 0), "harvest": (5 * 3 * 2 + 3 * 3, 0), "train": (12, 12)},
        ),
        # and with a teacher, which has no backward pass and is asked for the target, too, in four steps of two rows
        (
            "balanced",
            {"dataset": DRAWN, "training": TRAINING},
            {"encode": (0, 0), "draw": (5 * 3 * 2, 0), "train": (24 + 4 * 2, 12)},
        ),
        # the student is its own teacher, and the anchor pairs of the regularization have a gradient too
        (
            "paper",
            {"dataset": {**DRAWN, "preserve": 0}, "training": {"steps": 2, "batch": 2, "regularization": 1.0}},
            {"encode": (0, 0), "draw": (3 * 3 * 2, 0), "train": (2 * 3 * 2, 2 * 2 * 2)},
        ),
    ],
)
def test_each_phase_counts_its_rows(tiny, seen, preset, options, expected):
    passes, back = seen
    made = ablate(tiny, [TASK], recipe(preset, tiny, **options))
    assert {phase.name: (phase.forward, phase.backward) for phase in made.phases} == expected
    assert sum(phase.forward for phase in made.phases) == sum(passes)
    assert sum(phase.backward for phase in made.phases) == sum(back)
    assert made.seconds.keys() == expected.keys() and all(seconds >= 0 for seconds in made.seconds.values())
    assert "denoise" not in vars(tiny)


def test_counters_nest_and_leave_no_trace_after_an_error(tiny):
    x, sigma, cond = torch.zeros(2, *tiny.latent_shape), torch.ones(2), tiny.encode(["a", "b"])
    meter = Meter(tiny)

    def run():
        with meter.phase("outer"), counted(tiny) as inner:
            tiny.direction(x, sigma, cond)
            tiny.denoise(x[:1], sigma[:1], cond[:1])
            assert inner.forward == 3
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run()
    assert "denoise" not in vars(tiny) and meter.phases == []
    with counted(tiny) as outer, torch.no_grad():
        with counted(tiny) as inner:
            tiny.denoise(x, sigma, cond)
        tiny.denoise(x, sigma, cond)
    assert (inner.forward, outer.forward, outer.backward) == (2, 4, 0)
    assert "denoise" not in vars(tiny)
