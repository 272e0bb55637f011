"""`concept-ablation ui`: serve the page to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.files import require_writable
from ..web.app import Access, make_app, serve
from .options import Device, JudgeOption, Precision


def ui(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Offer this model too (folder, .safetensors or hub id); give it again for several."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for deltas and reports; the page serves only this one.")] = Path(
        "outputs/ui"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    listen: Annotated[
        bool, typer.Option("--listen", help="Let other machines in; needs --user and --password.")
    ] = False,
    share: Annotated[
        bool, typer.Option("--share", help="A public address through gradio's servers; needs --user and --password.")
    ] = False,
    user: Annotated[str | None, typer.Option(envvar="CONCEPT_ABLATION_USER", help="User of the page.")] = None,
    password: Annotated[
        str | None, typer.Option(envvar="CONCEPT_ABLATION_PASSWORD", help="Password of the page.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    judge: JudgeOption = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Open the page in a browser: type a concept, press Ablate, watch, compare, download the delta."""
    access = Access(listen, share, user, password)
    access.check()
    require_writable(output)
    app = make_app(output, model or (), access, device=device, precision=precision, judge=judge)
    _, url, public = serve(app, output, access, port=port, inbrowser=browser, quiet=True, prevent_thread_lock=True)
    typer.echo(f"The page is at {public or url} (Ctrl-C ends it); what it makes goes to {output.resolve()}")
    app.block_thread()
