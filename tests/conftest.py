"""Fixtures that many tests share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizerFast as CLIPTokenizer

from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, DiffusersDenoiser, Parts, load_denoiser
from concept_ablation.tools.browser import NO_CHROMIUM, find_chromium, launch

REQUIRED = bool(os.environ.get("CI") or os.environ.get("CONCEPT_ABLATION_REQUIRE_COMFYUI"))
COMFYUI = "tests/comfyui/"
LONGEST = (COMFYUI, "tests/web/test_browser.py")
"""How the ids of tests begin that take minutes: begun last, they would run on when the other workers are done."""
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def pytest_configure() -> None:
    """Share the cores among pytest-xdist's workers and what they start, which would only wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(
        key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """With `--dist loadfile`, one worker gets all of ComfyUI's tests, which then share a server."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    # the mark that is made for this, xdist_group, does nothing in xdist 3.8 with pytest 9.2
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return COMFYUI if nodeid.startswith(COMFYUI) else super()._split_scope(nodeid)

    return Files(config, log)


def unavailable(reason: str) -> None:
    """Skip the test; fail it where everything must be there."""
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def make_tiny(width: int = 32, seed: int = 0, prediction_type: str = "epsilon") -> DiffusersDenoiser:
    """A random Stable Diffusion of a few thousand weights: 8x8 latents, the real tokenizer, everything in fp32."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    text_config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=49408
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    schedule = {**SCHEDULE, "prediction_type": prediction_type}
    parts = Parts(unet, CLIPTextModel(text_config), _tokenizer(), vae, schedule)
    return DiffusersDenoiser(parts, "tiny", torch.device("cpu"), None)


@functools.cache
def _tokenizer() -> CLIPTokenizer:
    # a quarter of a second to load, and nothing changes it
    return CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DiffusersDenoiser]:
    """`make_tiny`, for tests that need several random models."""
    return make_tiny


@pytest.fixture
def tiny() -> DiffusersDenoiser:
    return make_tiny()


@pytest.fixture(scope="session")
def emoji() -> DiffusersDenoiser:
    """The embedded model, as users get it."""
    return load_denoiser()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    path = find_chromium()
    if path is None:
        unavailable(NO_CHROMIUM)
    return str(path)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Any]:
    """A headless browser, one for all tests: playwright's synchronous API can be started once in a process."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("there is no playwright: pip install playwright")
    with sync_playwright() as playwright:
        started = launch(playwright, chromium)
        yield started
        started.close()


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: where CONCEPT_ABLATION_ARTEFACTS says, or with pytest's files."""
    folder = os.environ.get("CONCEPT_ABLATION_ARTEFACTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
