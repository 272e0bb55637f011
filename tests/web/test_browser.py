"""The page in a real browser, on the embedded model with tiny settings, as somebody meets it who has never seen it."""

from __future__ import annotations

import base64
import io
import shutil
import sys
import time

import numpy as np
import pytest
from PIL import Image

from concept_ablation import cli
from concept_ablation.core import delta_file

playwright = pytest.importorskip("playwright.sync_api")

SAMPLING = 4
TINY = {
    "Steps": "6",
    "Batch": "2",
    "Learning rate": "0.006",
    "Of the anchor": "4",
    "Of the neighbours": "2",
    "Sampling steps": str(SAMPLING),
    "Prompts a concept": "1",
    "Pictures a prompt": "1",
}
SECONDS = 180
MILLISECONDS = SECONDS * 1000


def fill(page, target, anchor, **other):
    """Type a concept and, in the advanced fold, what makes it quick."""
    page.get_by_label("Remove", exact=True).first.fill(target)
    page.get_by_label("Draw instead").fill(anchor)
    if not page.get_by_label("Batch", exact=True).is_visible():
        page.get_by_text("Advanced", exact=True).click()
    for label, value in {**TINY, **other}.items():
        page.get_by_label(label, exact=True).first.fill(value)


def ablate(page):
    # by its role: while the button still says "Add to the queue", the tab is the only thing that says "Ablate"
    page.get_by_role("button", name="Ablate", exact=True).click()


def wait_for_field(page, text):
    """Wait until a field of the page holds that text."""
    held = "text => [...document.querySelectorAll('textarea, input')].some(field => field.value === text)"
    page.wait_for_function(held, arg=text)


def await_state(page, state, title=""):
    """Wait until the job of that title is in that state; say what the page shows instead."""
    try:
        page.locator(f".ca-card.ca-{state}", has_text=title).wait_for(timeout=MILLISECONDS)
    except playwright.TimeoutError as error:
        shown = page.locator(".ca-side, .ca-error").all_inner_texts()
        raise AssertionError(f"no card is {state}: {shown}") from error


def picture(page, section, alt):
    """The first picture of a concept on the page: before or after."""
    image = page.locator(".ca-pairs section").nth(section).locator(f"img[alt='{alt}']").first
    data = image.get_attribute("src").partition("base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def difference(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean()


def test_ablate_compare_download_and_draw_the_same_picture_with_the_cli(
    open_page, tmp_path, monkeypatch, capsys, artefacts
):
    page = open_page()
    page.screenshot(path=artefacts / "ablate-idle-1280-light.png")
    page.get_by_label("Remove", exact=True).first.fill("Tropical Fish")
    page.get_by_label("Draw instead").focus()
    wait_for_field(page, "fish")
    fill(page, "tropical fish", "fish")
    ablate(page)
    await_state(page, "running")
    seen = set()
    end = time.monotonic() + SECONDS
    while page.locator(".ca-card.ca-done").count() == 0 and time.monotonic() < end:
        bars = page.locator(".ca-bar").evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-valuenow'))")
        seen.add(tuple(bars))
        time.sleep(0.2)
    await_state(page, "done")
    moved = sorted(tuple(map(int, bars)) for bars in seen if bars)
    assert len(moved) >= 3, "progress did not move"
    assert page.locator(".ca-chart circle").count() == 1
    rows = page.locator(".ca-table tbody tr").all_inner_texts()
    assert len(rows) == 2 and rows[0].startswith("tropical fish") and "%" in rows[0]
    assert page.locator(".ca-pairs section").count() == 2
    assert difference(picture(page, 0, "before"), picture(page, 0, "after")) > 3, "the edit changed nothing"
    page.screenshot(path=artefacts / "ablate-done-1280-light.png", full_page=True)

    with page.expect_download() as download:
        page.locator(".ca-files a:visible").first.click()
    file = tmp_path / "downloaded.safetensors"
    download.value.save_as(file)
    assert delta_file.load(file).metadata["concept_ablation.target"] == "tropical fish"
    prompt = page.locator(".ca-pairs section").first.locator("figcaption").first.inner_text()
    drawn = {}
    for name, delta in (("before", []), ("after", ["--delta", str(file)])):
        arguments = ["sample", "--prompt", prompt, "--steps", str(SAMPLING), *delta, "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["concept-ablation", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0, capsys.readouterr().err
        drawn[name] = np.asarray(Image.open(tmp_path / name / "0_0.png"))
    # the page's copies went through WebP, which costs a few levels
    assert difference(picture(page, 0, "after"), drawn["after"]) < 3
    assert difference(picture(page, 0, "before"), drawn["before"]) < 3
    assert difference(drawn["before"], drawn["after"]) > 3


def test_cancel_in_the_middle_then_run_again(open_page):
    page = open_page()
    fill(page, "tropical fish", "fish", Steps="5000")
    ablate(page)
    page.locator(".ca-chart").wait_for(timeout=MILLISECONDS)
    page.get_by_role("button", name="Cancel").click()
    await_state(page, "cancelled")
    assert not page.get_by_role("button", name="Cancel").is_visible()
    assert page.locator(".ca-pairs").count() == 0
    fill(page, "tropical fish", "fish", Steps="2")
    ablate(page)
    await_state(page, "done")
    page.locator(".ca-pairs img").first.wait_for()
    assert "cancelled" in page.locator(".ca-queue li").first.inner_text()


def test_wrong_input_is_said_at_the_field(open_page, artefacts):
    page = open_page()
    ablate(page)
    page.locator(".ca-error").first.wait_for()
    assert page.locator(".ca-error").all_inner_texts() == [
        "The target is empty; name a concept.",
        "The anchor is empty; name a concept.",
    ]
    page.screenshot(path=artefacts / "ablate-errors-1280-light.png")
    field = page.get_by_label("Remove", exact=True).first.bounding_box()
    message = page.locator(".ca-error").first.bounding_box()
    assert 0 <= message["y"] - (field["y"] + field["height"]) < 24, "the message is not right below its field"

    fill(page, "Fish", "fish ", Steps="many")
    ablate(page)
    page.get_by_text("must be a whole number, not 'many'").wait_for()
    assert page.locator(".ca-error", has_text="both 'Fish'").is_visible()
    assert page.locator(".ca-error").count() == 2 and page.locator(".ca-card").count() == 0

    fill(page, "tropical fish", "fish")
    model = page.get_by_label("Model")
    model.fill("./nowhere/at/all")
    model.press("Enter")
    ablate(page)
    await_state(page, "failed")
    page.locator(".ca-error", has_text="There is no model at ./nowhere/at/all").wait_for()


def test_two_sessions_at_once_take_turns_and_see_only_their_own(open_page):
    first, second = open_page(), open_page()
    fill(first, "tropical fish", "fish", Steps="5000")
    ablate(first)
    await_state(first, "running")
    fill(second, "rooster", "bird", Steps="2")
    ablate(second)
    await_state(second, "waiting")
    assert "Waiting: 1 job is before this one." in second.locator(".ca-card").inner_text()
    first.get_by_role("button", name="Cancel").click()
    await_state(first, "cancelled")
    await_state(second, "done")
    second.locator(".ca-pairs img").first.wait_for()
    assert second.locator(".ca-table tbody tr").first.inner_text().startswith("rooster")
    assert first.locator(".ca-pairs").count() == 0 and "rooster" not in first.locator("body").inner_text()


def test_a_queue_of_concepts_and_a_reload(open_page):
    page = open_page()
    # long enough to run still when the second concept is typed in
    fill(page, "tropical fish", "fish", Steps="100")
    ablate(page)
    await_state(page, "running")
    fill(page, "rooster", "bird", Steps="2")
    page.get_by_role("button", name="Add to the queue").click()
    page.locator(".ca-queue li").nth(1).wait_for()
    page.reload()
    page.locator(".ca-queue li").nth(1).wait_for()
    page.locator(".ca-queue li.ca-done").nth(1).wait_for(timeout=MILLISECONDS)
    page.locator(".ca-table th", has_text="rooster").wait_for()
    page.get_by_label("Result").click()
    page.get_by_role("option", name="tropical fish").click()
    page.locator(".ca-table th", has_text="tropical fish").wait_for()


def test_html_in_a_name_stays_text(open_page):
    page = open_page()
    hostile = "<img src=x onerror='window.hacked=1'>${window.hacked=2}{{7*7}}"
    # one gentle step: the rate that suits the other tests lets these odd tokens diverge
    fill(page, hostile, "<b>fish</b>", **{"Steps": "1", "Learning rate": "0.0001"})
    ablate(page)
    await_state(page, "done")
    page.locator(".ca-report summary").click()
    page.frame_locator(".ca-report iframe").get_by_role("heading").first.wait_for()
    page.get_by_role("tab", name="Saved deltas").click()
    page.locator(".ca-details").wait_for()
    assert hostile in page.locator(".ca-details").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src='x']").count() == 0 and page.locator("b", has_text="fish").count() == 0


def test_saved_deltas_are_used_merged_and_deleted(open_page, site, artefacts, tmp_path):
    page = open_page()
    for target, anchor in (("tropical fish", "fish"), ("rooster", "bird")):
        fill(page, target, anchor, **{"Steps": "2", "Name of the saved file": f"../../{target} kept"})
        ablate(page)
        await_state(page, "done", target)
    names = ["tropical-fish-kept.safetensors", "rooster-kept.safetensors"]
    assert all((site.output / "deltas" / name).is_file() for name in names)

    page.get_by_role("tab", name="Saved deltas").click()
    for name in names:
        page.get_by_label("Delta (").click()
        page.get_by_role("option", name=name).click()
        page.locator(".ca-details", has_text=name).wait_for()
        page.get_by_role("button", name="Add to the merge").click()
        page.locator(".ca-chips", has_text=name).wait_for()
    page.get_by_label("Name of the merged file").fill("../both")
    page.get_by_role("button", name="Merge", exact=True).click()
    page.locator(".ca-details", has_text="both.safetensors").wait_for()
    assert (site.output / "deltas" / "both.safetensors").is_file()
    page.get_by_role("button", name="Apply to the model").locator("visible=true").click()
    page.locator(".ca-chips:visible", has_text="both.safetensors × 1").wait_for()
    page.screenshot(path=artefacts / "saved-1280-light.png", full_page=True)
    assert page.locator(".ca-files a:visible").count() == 0
    page.get_by_role("button", name="Download", exact=True).click()
    with page.expect_download() as download:
        page.locator(".ca-files a:visible").click()
    download.value.save_as(tmp_path / "both.safetensors")
    assert delta_file.load(tmp_path / "both.safetensors").metadata["concept_ablation.merged"]

    page.get_by_role("tab", name="Try it").click()
    page.get_by_label("Prompt", exact=True).fill("a picture of a rooster")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Drawing:").wait_for()
    page.reload()  # and this page, which did not ask, finds what is drawn
    page.get_by_label("Draw instead").wait_for()
    page.wait_for_timeout(2000)
    page.get_by_role("tab", name="Try it").click()
    page.locator(".ca-pairs:visible img[alt='with the deltas']").nth(3).wait_for(timeout=MILLISECONDS)
    page.get_by_role("button", name="Cancel").locator("visible=true").wait_for(state="hidden")
    page.screenshot(path=artefacts / "try-1280-light.png")

    page.get_by_role("tab", name="Saved deltas").click()
    page.get_by_role("button", name="Delete this delta").click()
    page.get_by_role("button", name="Keep it").click()
    assert (site.output / "deltas" / "both.safetensors").is_file()
    page.get_by_role("button", name="Delete this delta").click()
    page.get_by_role("button", name="Delete it").wait_for()
    page.get_by_role("tab", name="Try it").click()
    shutil.copy(site.output / "deltas" / "both.safetensors", site.output / "deltas" / "other.safetensors")
    page.get_by_role("tab", name="Saved deltas").click()
    saved = len(list((site.output / "deltas").glob("*.safetensors")))
    page.get_by_label(f"Delta ({saved})").wait_for()  # the list was read again, and that took no question away
    assert page.locator(".ca-details:visible", has_text="both.safetensors").is_visible()
    page.get_by_text("Delete both.safetensors?").wait_for()
    page.get_by_role("button", name="Delete it").click()
    page.get_by_text("both.safetensors is deleted.").wait_for()
    assert not (site.output / "deltas" / "both.safetensors").exists()
    page.get_by_text("No delta is applied.").locator("visible=true").wait_for()


def test_no_page_scrolls_sideways(open_page, artefacts):
    page = open_page(420)
    fill(page, "tropical fish", "fish", Steps="2")
    ablate(page)
    page.locator(".ca-card").wait_for()
    page.wait_for_function("document.querySelector('.ca-card').getBoundingClientRect().top < innerHeight")
    await_state(page, "done")
    for width, scheme in ((420, "light"), (420, "dark"), (1280, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{page.url.partition('?')[0]}?__theme={scheme}")
        page.locator(".ca-pairs img").first.wait_for()
        for name in ("Ablate", "Saved deltas", "Try it"):
            page.get_by_role("tab", name=name).click()
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width, (name, width, scheme)
            page.screenshot(path=artefacts / f"{name.split()[0].lower()}-{width}-{scheme}.png", full_page=True)
