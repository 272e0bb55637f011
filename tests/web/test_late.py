"""The page in a real browser when something comes late: an answer, a click, a connection."""

from __future__ import annotations

import gc
import threading
import time
from datetime import timedelta

import pytest

from concept_ablation.core.errors import AblationError
from concept_ablation.core.progress import Progress
from concept_ablation.tests.web.test_browser import SECONDS, ablate, await_state, fill, wait_for_field
from concept_ablation.web import views
from concept_ablation.web.words import KIND_LABELS

StateHolder = pytest.importorskip("gradio.state_holder").StateHolder


@pytest.fixture
def held(monkeypatch):
    """Ablations do nothing until their target is put into this set, and then they fail."""
    over = set()

    def ablation(host, request):
        def work(job):
            while request.task.concept.target not in over:
                job.step(Progress("Training", 1, 2, 0.1))
                time.sleep(0.05)
            raise AblationError("The disk is full.")

        return work

    monkeypatch.setattr("concept_ablation.web.ablate_page.ablation", ablation)
    yield over
    # of a test that failed: the jobs of the next one would wait for it
    over.update(("tropical fish", "rooster"))


def test_a_suggestion_that_comes_late_leaves_what_was_typed_meanwhile(open_page, monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def late(*_):
        asked.set()
        assert answer.wait(SECONDS)
        return "fish"

    monkeypatch.setattr("concept_ablation.web.ablate_page.suggest_anchor", late)
    page = open_page()
    target, anchor = page.get_by_label("Remove", exact=True).first, page.get_by_label("Draw instead")
    target.fill("tropical fish")
    anchor.focus()
    assert asked.wait(SECONDS)
    anchor.fill("boat")
    answer.set()
    page.wait_for_timeout(2000)
    assert anchor.input_value() == "boat"
    anchor.fill("")
    target.focus()
    anchor.focus()
    wait_for_field(page, "fish")


def test_an_anchor_for_another_kind_that_comes_late_leaves_what_was_typed_meanwhile(open_page, monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def late(target, kind, *_):
        if kind == "instance":
            return "fish" if answer.is_set() else ""
        asked.set()
        assert answer.wait(SECONDS)
        return "emoji"

    def choose(kind):
        page.get_by_label("It is").click()
        page.get_by_role("option", name=kind).click()

    monkeypatch.setattr("concept_ablation.web.ablate_page.suggest_anchor", late)
    page = open_page()
    anchor = page.get_by_label("Draw instead")
    page.get_by_label("Remove", exact=True).first.fill("tropical fish")
    choose(KIND_LABELS["style"])
    assert asked.wait(SECONDS)
    anchor.fill("boat")
    answer.set()
    page.wait_for_timeout(2000)
    assert anchor.input_value() == "boat"
    anchor.fill("emoji")
    choose(KIND_LABELS["instance"])
    # in place of what suits a style
    wait_for_field(page, "fish")


def test_a_dropped_connection_takes_neither_card_nor_cancel_away(open_page, held):
    page = open_page()
    fill(page, "tropical fish", "fish")
    ablate(page)
    await_state(page, "running")
    # as gradio notes a connection that dropped, two hours ago
    states = [
        state for holder in gc.get_objects() if type(holder) is StateHolder for state in holder.session_data.values()
    ]
    assert states
    for state in states:
        state.is_closed = True
        for key, (kept, written) in state._state_ttl.items():
            state._state_ttl[key] = (kept, written - timedelta(hours=2))
    page.wait_for_timeout(10_000)
    assert page.locator(".ca-card.ca-running", has_text="tropical fish").is_visible()
    page.get_by_role("button", name="Cancel").locator("visible=true").click()
    await_state(page, "cancelled")


def test_cancel_that_was_pressed_when_its_job_had_just_ended_leaves_the_next_one(open_page, held, monkeypatch):
    reached, answer, queue = threading.Event(), threading.Event(), views.queue

    def late(jobs, places):
        if [job.state for job in jobs] == ["failed", "running"]:
            reached.set()
            assert answer.wait(SECONDS)
        return queue(jobs, places)

    monkeypatch.setattr(views, "queue", late)
    page = open_page()
    fill(page, "tropical fish", "fish")
    ablate(page)
    await_state(page, "running")
    fill(page, "rooster", "bird")
    page.get_by_role("button", name="Add to the queue").click()
    page.locator(".ca-queue li").nth(1).wait_for()
    held.add("tropical fish")
    assert reached.wait(SECONDS)
    # the server looked at the next job already, but the page does not know it yet
    await_state(page, "running", "tropical fish")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_timeout(1000)
    answer.set()
    await_state(page, "running", "rooster")
    page.wait_for_timeout(3000)
    assert page.locator(".ca-card.ca-running", has_text="rooster").is_visible()
    assert "The disk is full." in page.locator(".ca-queue li.ca-failed").inner_text()
    page.get_by_role("button", name="Cancel").click()
    await_state(page, "cancelled", "rooster")
