"""The smallest ablation, on a random model of a few thousand weights, for the tests of the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from concept_ablation.core.denoiser import Denoiser
from concept_ablation.web.form import Form
from concept_ablation.web.standalone import EMBEDDED, StandaloneHost

GOOD = Form(model=EMBEDDED, target="tropical fish", anchor="fish")
TINY = replace(
    GOOD,
    images="2",
    preserve="1",
    sampling="2",
    steps="4",
    batch="1",
    eval_prompts="1",
    eval_seeds="1",
    surrounding="cat",
)
HOSTILE = '<img src=x onerror="window.hacked=1">'


class TinyHost(StandaloneHost):
    """The stand-alone host on a random model."""

    def __init__(self, output: Path, denoiser: Denoiser) -> None:
        super().__init__(output)
        self.tiny = denoiser

    def _load(self, model: str) -> Denoiser:
        return self.tiny if model == EMBEDDED else super()._load(model)
