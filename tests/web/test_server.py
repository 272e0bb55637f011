"""The served page without a browser: what its HTTP routes give and refuse, and an ablation through its API."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from gradio_client import Client

from concept_ablation.core import delta_file
from concept_ablation.core.errors import AblationError
from concept_ablation.core.progress import Progress
from concept_ablation.tests.web.conftest import served
from concept_ablation.tests.web.tiny import GOOD, TINY, TinyHost
from concept_ablation.web.form import FIELDS
from concept_ablation.web.host import Host
from concept_ablation.web.jobs import Job, Runner
from concept_ablation.web.session import session_of

SECONDS = 120
KEY = "0123456789abcdef" * 2


def status(url: str, data: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def file_route(site) -> str:
    """The address that gradio serves files under; which one it is was proved on a file of our own."""
    own = site.output / "own.txt"
    own.write_text("own", "utf-8")
    for route in ("gradio_api/file=", "file="):
        if status(f"{site.url}{route}{own}") == (200, b"own"):
            return f"{site.url}{route}"
    raise AssertionError("the file route was not found")


def test_the_page_is_there(site):
    code, page = status(site.url)
    assert code == 200 and b"Concept Ablation" in page


def test_no_file_outside_the_output_folder_is_served(file_route, site):
    secret = site.output.parent / "secret.txt"
    secret.write_text("secret words", "utf-8")
    sibling = Path(f"{site.output}-other")
    sibling.mkdir()
    (sibling / "secret.txt").write_text("secret words", "utf-8")
    here = Path(__file__).resolve()
    tried = [
        secret,
        site.output / ".." / "secret.txt",
        f"{site.output}/%2e%2e/secret.txt",
        f"{site.output}/..%2fsecret.txt",
        sibling / "secret.txt",
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "file:///etc/passwd",
        here,
        here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here,
        "cli/app.py",
        "pyproject.toml",
    ]
    for path in tried:
        code, body = status(file_route + str(path))
        assert code in (400, 403, 404), f"{path} gave {code}"
        assert b"secret words" not in body and b"root:" not in body


def test_only_this_machine_can_reach_it(site):
    address = urlsplit(site.url)
    assert address.hostname == "127.0.0.1"
    with pytest.raises(OSError, match=r".+"), socket.create_connection(("127.0.0.2", address.port), timeout=2):
        pass


def test_with_a_password_nothing_is_given_without_it(gradio, tmp_path, make_model):
    from concept_ablation.web.tab import build_tab

    app = build_tab(TinyHost(tmp_path, make_model()))
    (tmp_path / "own.txt").write_text("own", "utf-8")
    with served(app, tmp_path, user="me", password="long enough") as site:
        for route in ("config", "gradio_api/info", f"gradio_api/file={tmp_path}/own.txt", f"file={tmp_path}/own.txt"):
            code, body = status(site.url + route)
            assert code in (401, 403, 404) and body != b"own", route
        wrong = urllib.parse.urlencode({"username": "me", "password": "wrong"}).encode()
        assert status(f"{site.url}login", wrong)[0] == 400
        right = urllib.parse.urlencode({"username": "me", "password": "long enough"}).encode()
        assert status(f"{site.url}login", right)[0] == 200


def test_a_host_with_one_model_and_no_drawing_gets_a_plain_tab(gradio, tmp_path, make_model):
    """What a WebUI extension gives: no model to choose, no page for drawing, no heading."""
    from concept_ablation.web.tab import build_tab

    host = TinyHost(tmp_path, make_model())
    host.draws, host.free_model, host.models = False, False, host.models[:1]
    assert isinstance(host, Host)
    config = json.dumps(build_tab(host).config, default=str)
    assert "Try it" not in config and "<h1>" not in config and "Saved deltas" in config


def test_events_that_write_the_same_part_of_the_page_take_turns(gradio, tmp_path, make_model):
    """An older answer that came last left a page that had stopped asking as it was before."""
    from concept_ablation.web.tab import build_tab

    host = TinyHost(tmp_path, make_model())
    host.draws = False  # that page looks again for as long as it does not know the end
    events = build_tab(host).fns.values()
    writing = [event for event in events if any(isinstance(output, gradio.Timer) for output in event.outputs)]
    assert len(writing) == 5, "start, tick, the slow tick, cancel, and what a page shows first"
    assert {event.concurrency_limit for event in writing} == {1}
    assert len({event.concurrency_id for event in writing}) == 1


def test_a_session_in_which_a_job_was_started_before_the_page_had_its_key_stays():
    assert session_of(KEY, "") == KEY and session_of(KEY, "begun already") == "begun already"
    assert len(session_of("../x", "")) == 32


def test_the_slow_tick_writes_the_session_so_that_gradio_does_not_let_it_go(gradio, tmp_path, make_model):
    """gradio deletes what was not written for an hour, once a page's connection has dropped."""
    from concept_ablation.web.tab import build_tab

    app = build_tab(TinyHost(tmp_path, make_model()))
    slow = [timer._id for timer in app.blocks.values() if isinstance(timer, gradio.Timer) and timer.value == 5]
    (tick,) = (event for event in app.fns.values() if event.targets == [(slow[0], "tick")])
    session = tick.outputs[0]
    assert isinstance(session, gradio.State) and session in tick.inputs and "localStorage" in tick.js
    assert tick.fn(KEY, "", (0, 0))[0] == KEY and tick.fn(KEY, "begun already", (0, 0))[0] == "begun already"


def test_cancel_ends_the_job_that_the_page_shows_and_not_the_next_one(gradio, tmp_path, make_model):
    from concept_ablation.web.ablate_page import AblatePage

    runner, go = Runner(), threading.Event()

    def fail(job: Job) -> None:
        raise AblationError("The disk is full.")

    def work(job: Job) -> None:
        while not go.wait(0.005):
            job.step(Progress("Training", 1, 2, 0.1))

    shown = runner.submit(Job(KEY, "shown", fail))
    next_one, third, other = (runner.submit(Job(session, "more", work)) for session in (KEY, KEY, "another's"))
    assert shown.wait(SECONDS)
    with gradio.Blocks():
        page = AblatePage(TinyHost(tmp_path, make_model()), runner, gradio.State(""))
    page._stop(KEY, (0, 0), str(shown.id))
    page._stop(KEY, (0, 0), str(other.id))
    page._stop(KEY, (0, 0), str(third.id))
    assert third.state == "cancelled" and next_one.active and not next_one.cancelling
    page._stop(KEY, (0, 0), "")
    assert next_one.wait(SECONDS) and next_one.state == "cancelled", "without a page, the current one is meant"
    go.set()
    assert other.wait(SECONDS) and other.state == "done"


def values(form):
    return [getattr(form, name) for name in FIELDS]


def test_an_ablation_runs_through_the_http_api(site):
    client = Client(site.url, verbose=False)
    wrong = client.predict(*values(GOOD)[:2], "Tropical Fish", *values(GOOD)[3:], api_name="/ablate")
    assert "target and the anchor are both" in json.dumps(wrong)
    started = client.predict(*values(TINY), api_name="/ablate")
    assert "target and the anchor are both" not in json.dumps(started)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        answer = json.dumps(client.predict(api_name="/progress"))
        assert "ca-failed" not in answer, answer
        if "ca-done" in answer and "ca-table" in answer:
            break
        time.sleep(0.5)
    assert "ca-pairs" in answer and "report.html" in answer
    assert "ca-done" in json.dumps(client.predict(api_name="/cancel")), "too late"
    (saved,) = site.output.glob("deltas/tropical-fish-to-fish.safetensors")
    assert delta_file.load(saved).metadata["concept_ablation.target"] == "tropical fish"


def test_the_api_offers_only_what_is_meant_for_it(site):
    offered = Client(site.url, verbose=False).view_api(return_format="dict", print_info=False)
    assert set(offered["named_endpoints"]) == {"/ablate", "/progress", "/cancel", "/draw"}


def test_a_port_that_is_taken_is_said_in_one_sentence(gradio, tmp_path, make_model):
    from concept_ablation.web.app import Access, serve
    from concept_ablation.web.tab import build_tab

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AblationError, match=f"Port {port} cannot be used"):
            serve(build_tab(TinyHost(tmp_path, make_model())), tmp_path, Access(), port=port, quiet=True)
