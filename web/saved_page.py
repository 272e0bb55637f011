"""The page *Saved deltas*: what is in the folder, applying, merging, exporting, downloading, deleting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import AblationError
from . import library, views
from .compat import private
from .host import Host

Part = tuple[str, float]


class SavedPage:
    """Components and events of the page. Made inside a `gr.Tab`; `connect` afterwards."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._folder = host.delta_folder
        self._basket = gr.State([])
        with gr.Row(elem_classes="ca-columns"):
            with gr.Column(scale=5, min_width=320):
                self.choice = gr.Dropdown(label="Delta", choices=[], elem_classes="ca-saved")
                self._details = gr.HTML()
                self._download = gr.Button("Download", elem_classes="ca-narrow")
                self._file = gr.File(label="File", interactive=False, visible=False, elem_classes="ca-files")
            with gr.Column(scale=8, min_width=320, elem_classes="ca-side"):
                self._note = gr.HTML()
                self._build_use()
                self._build_merge()
                self._build_delete()

    @property
    def listing(self) -> list[Any]:
        """What `refresh` fills."""
        return [self.choice, *self._chosen_outputs, self._applied]

    @property
    def _chosen_outputs(self) -> list[Any]:
        return [self._details, self._file, self._confirm]

    def _build_use(self) -> None:
        gr.HTML('<p class="ca-group">Use it</p>')
        self._strength = gr.Slider(-1, 2, value=1, step=0.05, label="Strength: 1 is the edit as trained, 0 is none")
        with gr.Row(elem_classes="ca-actions"):
            self._apply = gr.Button("Apply to the model", variant="primary", min_width=150)
            self._remove = gr.Button("Remove", min_width=100)
            self._add = gr.Button("Add to the merge", min_width=140)
        self._applied = gr.HTML(views.applied(self._host.applied()))
        with gr.Row(elem_classes="ca-actions"):
            self._rank = gr.Slider(1, 128, value=8, step=1, label="LoRA rank", min_width=180)
            self._export = gr.Button("Make a LoRA of this rank", min_width=180)

    def _build_merge(self) -> None:
        gr.HTML('<p class="ca-group">Merge</p>')
        self._parts = gr.HTML(views.basket([]))
        self._name = gr.Textbox(label="Name of the merged file", placeholder="merged", max_lines=1)
        with gr.Row(elem_classes="ca-actions"):
            self._merge = gr.Button("Merge", min_width=120)
            self._clear = gr.Button("Clear", min_width=100)

    def _build_delete(self) -> None:
        gr.HTML('<p class="ca-group">Delete</p>')
        self._delete = gr.Button("Delete this delta", elem_classes="ca-narrow")
        # on the page and no gr.State: the answer comes with the file that the question on the screen names
        self._asked = gr.Textbox("", visible=False)
        with gr.Column(visible=False, elem_classes="ca-confirm") as self._confirm:
            self._question = gr.HTML()
            with gr.Row(elem_classes="ca-actions"):
                self._yes = gr.Button("Delete it", variant="stop", min_width=120)
                self._no = gr.Button("Keep it", min_width=100)

    def connect(self) -> None:
        """Attach the events."""
        quiet = {"show_progress": "hidden", **private()}
        # by hand only: what chooses another delta sends what belongs to it along
        self.choice.input(self._choose, self.choice, self._chosen_outputs, **quiet)
        self._download.click(self._do_download, self.choice, [self._note, self._file], **quiet)
        self._apply.click(self._do_apply, [self.choice, self._strength], [self._note, self._applied], **quiet)
        self._remove.click(self._do_remove, self.choice, [self._note, self._applied], **quiet)
        basket = [self._note, self._basket, self._parts]
        self._add.click(self._do_add, [self.choice, self._strength, self._basket], basket, **quiet)
        self._clear.click(lambda: ("", [], views.basket([])), None, basket, **quiet)
        self._merge.click(self._do_merge, [self._basket, self._name], [*basket, *self.listing], **quiet)
        self._export.click(self._do_export, [self.choice, self._rank], [self._note, *self.listing], **quiet)
        asking = [self._note, self._asked, self._question, self._confirm]
        self._delete.click(self._ask, self.choice, asking, **quiet)
        for answered in (self._yes, self._no):
            answered.click(lambda: gr.update(visible=False), None, self._confirm, **quiet)
        self._yes.click(self._do_delete, [self._asked, self.choice], [self._note, *self.listing], **quiet)

    def refresh(self, chosen: str | None) -> list[Any]:
        """The list as it is now. If `chosen` is gone, the newest delta is chosen.

        If not, nothing but the list is sent: what was chosen or asked while this was on its way stays.
        """
        files = self._files()
        if chosen not in files:
            return self._list(files, next(iter(files), None))
        kept = [gr.skip()] * len(self._chosen_outputs)
        return [gr.update(choices=files, label=_label(files)), *kept, views.applied(self._host.applied())]

    def _list(self, files: Sequence[str], chosen: str | None) -> list[Any]:
        """The list with another one chosen."""
        listed = gr.update(choices=files, value=chosen, label=_label(files))
        return [listed, *self._choose(chosen), views.applied(self._host.applied())]

    def _files(self) -> list[str]:
        return [item.file for item in library.saved(self._folder)]

    def _choose(self, chosen: str | None) -> list[Any]:
        if not chosen:
            return _chosen(views.note("No delta is saved yet: ablate a concept first."))
        try:
            return _chosen(views.details(library.find(self._folder, chosen)))
        except AblationError as error:
            return _chosen(views.note(str(error), "bad"))

    def _do_download(self, chosen: str | None) -> tuple[str, Any]:
        """Only now, because gradio makes a copy of what it shows for a download, and a delta may have gigabytes."""
        try:
            path = library.find(self._folder, chosen).path
        except AblationError as error:
            return views.note(str(error), "bad"), gr.skip()
        return "", gr.update(value=str(path), visible=True)

    def _do_apply(self, chosen: str | None, strength: float) -> tuple[str, str]:
        def apply() -> str:
            self._host.apply(library.find(self._folder, chosen).path, float(strength))
            return views.note(f"{chosen} is applied at strength {strength:g}.", "good")

        return _told(apply), views.applied(self._host.applied())

    def _do_remove(self, chosen: str | None) -> tuple[str, str]:
        def remove() -> str:
            self._host.remove(chosen)
            return ""

        return _told(remove), views.applied(self._host.applied())

    def _do_add(self, chosen: str | None, strength: float, parts: list[Part]) -> tuple[str, list[Part], str]:
        try:
            file = library.find(self._folder, chosen).file
        except AblationError as error:
            return views.note(str(error), "bad"), parts, views.basket(parts)
        parts = [*(part for part in parts if part[0] != file), (file, float(strength))]
        return "", parts, views.basket(parts)

    def _do_merge(self, parts: list[Part], name: str) -> list[Any]:
        try:
            path = library.merge_saved(self._folder, [(file, strength) for file, strength in parts], name or "")
        except AblationError as error:
            skipped = [gr.skip()] * len(self.listing)
            return [views.note(str(error), "bad"), parts, views.basket(parts), *skipped]
        self._host.files_changed()
        told = views.note(f"{path.name} is saved.", "good")
        return [told, [], views.basket([]), *self._list(self._files(), path.name)]

    def _do_export(self, chosen: str | None, rank: float) -> list[Any]:
        try:
            path, kept = library.export_lora(self._folder, chosen or "", int(rank))
        except AblationError as error:
            return [views.note(str(error), "bad"), *[gr.skip()] * len(self.listing)]
        self._host.files_changed()
        told = views.note(f"{path.name} is saved: {kept:.1%} of the energy kept.", "good")
        return [told, *self._list(self._files(), path.name)]

    def _ask(self, chosen: str | None) -> list[Any]:
        """Whether to delete it; which one is meant stays on the page, whatever is chosen before the answer."""
        try:
            file = library.find(self._folder, chosen).file
        except AblationError as error:
            return [views.note(str(error), "bad"), "", "", gr.update(visible=False)]
        question = f'<p class="ca-ask">Delete {escape(file)}? This cannot be undone.</p>'
        return ["", file, question, gr.update(visible=True)]

    def _do_delete(self, asked: str, chosen: str | None) -> list[Any]:
        def delete() -> str:
            # found first, and taken off before its file goes: a busy model keeps both
            file = library.find(self._folder, asked).file
            self._host.remove(file)
            library.delete(self._folder, file)
            self._host.files_changed()
            return views.note(f"{file} is deleted.", "good")

        return [_told(delete), *self.refresh(chosen)]


def _chosen(details: str) -> list[Any]:
    """A delta that was just chosen: what to say of it, nothing to download yet, and no question about another one."""
    return [details, gr.update(value=None, visible=False), gr.update(visible=False)]


def _label(files: Sequence[str]) -> str:
    return f"Delta ({len(files)})"


def _told(act: Callable[[], str]) -> str:
    """What `act` says, or what went wrong."""
    try:
        return act()
    except AblationError as error:
        return views.note(str(error), "bad")
