"""The stand-alone app, `concept-ablation ui`: the tab on models of the diffusers library, served to this machine.

It listens on 127.0.0.1 only, unless `--listen` or `--share` say otherwise; then it wants a user and a password, and
offers only the models that it was started with, because a typed path would be a path on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import AblationError

if TYPE_CHECKING:
    import gradio as gr

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
KEPT_COPIES = (3600, 24 * 3600)
"""Seconds between two looks at the copies that gradio makes of downloads and uploads, and how old those may get: deltas
are large, and a deleted one should not stay as a copy for ever.
"""
MIN_PASSWORD = 8


@dataclass(frozen=True)
class Access:
    """Who can reach the page."""

    listen: bool = False
    share: bool = False
    user: str | None = None
    password: str | None = None

    @property
    def open(self) -> bool:
        """Whether anyone but this machine can reach it."""
        return self.listen or self.share

    @property
    def login(self) -> tuple[str, str] | None:
        """The user and the password, if they are asked for."""
        return (self.user, self.password) if self.user and self.password else None

    def check(self) -> None:
        """Raise AblationError if others could come in without a password."""
        if bool(self.user) != bool(self.password):
            raise AblationError("Give both --user and --password, or neither.")
        if self.open and self.login is None:
            raise AblationError("--listen and --share open the page to others: give --user and --password as well.")
        if self.open and len(self.password or "") < MIN_PASSWORD:
            raise AblationError(f"The password is too short for an open page: use at least {MIN_PASSWORD} characters.")


def make_app(
    output: Path,
    models: Sequence[str] = (),
    access: Access | None = None,
    *,
    device: str | None = None,
    precision: str = "auto",
    judge: str | None = None,
) -> gr.Blocks:
    """The page, not yet served.

    Raises:
        AblationError: gradio is not installed.
    """
    # the page asks nothing of the network: no statistics, no version check
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise AblationError('The page needs gradio: install it with pip install "gradio>=4.40".') from error
    from .compat import blocks_arguments
    from .standalone import StandaloneHost
    from .tab import build_tab

    free = access is None or not access.open
    host = StandaloneHost(output, models, free_model=free, device=device, precision=precision, judge=judge)
    return build_tab(host, heading=True, delete_cache=KEPT_COPIES, **blocks_arguments(theme()))


def serve(app: gr.Blocks, output: Path, access: Access, *, port: int | None, **options: Any) -> tuple[Any, str, str]:
    """Serve the page as `access` says; `options` go to gradio's `launch`.

    Raises:
        AblationError: the access is open without a password, or the port is taken.
    """
    from .compat import launch_arguments

    access.check()
    try:
        return app.queue(default_concurrency_limit=8).launch(
            server_name=EVERYWHERE if access.listen else LOCAL,
            server_port=port,
            share=access.share,
            auth=access.login,
            allowed_paths=[str(output.resolve())],
            max_file_size="32mb",  # the one upload is a memorized picture; gradio would take any size
            **launch_arguments(theme()),
            **options,
        )
    except OSError as error:
        raise AblationError(
            f"Port {port} cannot be used, perhaps it is taken: choose another one with --port."
        ) from error


def theme() -> Any:
    """Calm colours, fields without boxes around them, and the system's own fonts, so that nothing is fetched."""
    import gradio as gr

    shades = "eef6f6 d6e9e9 b0d3d4 84b9bb 549b9e 357d80 2a6467 235356 1d4345 183739 0f2526"
    accent = gr.themes.Color(*(f"#{shade}" for shade in shades.split()))
    base = gr.themes.Base(
        primary_hue=accent,
        neutral_hue="stone",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Cascadia Mono", "Menlo", "monospace"],
    )
    return base.set(
        block_border_width="0px",
        block_border_width_dark="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        body_background_fill_dark="#16181b",
        background_fill_primary_dark="#16181b",
        background_fill_secondary_dark="#1e2125",
        border_color_primary_dark="#34383d",
        block_padding="0px",
        block_label_text_size="*text_sm",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
        form_gap_width="14px",
        input_background_fill="*background_fill_primary",
        input_background_fill_dark="*background_fill_secondary",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="#454a50",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_radius="*radius_md",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_large_text_weight="500",
        button_large_text_size="*text_md",
        slider_color="*primary_500",
        slider_color_dark="*primary_400",
        color_accent_soft="*primary_50",
    )
