"""Jobs of the page: order, queue, cancelling; and both kinds of work on a model of a few thousand weights."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_ablation.core import delta_file
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.metrics import Judge
from concept_ablation.core.progress import Progress
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.tests.web.tiny import HOSTILE, TINY, TinyHost
from concept_ablation.web import ablating, library, views
from concept_ablation.web.ablating import Pictures, ablation, drawing
from concept_ablation.web.form import check
from concept_ablation.web.jobs import KEPT_JOBS, KEPT_OVER_ALL, MAX_WAITING, OUT_OF_MEMORY, Job, Runner
from concept_ablation.web.standalone import EMBEDDED, StandaloneHost

SECONDS = 60


def held(title="held", session="one"):
    """A job that runs until its event is set."""
    go = threading.Event()

    def work(job):
        for step in range(10_000):
            job.step(Progress("Training", step, 10_000, 0.1))
            if go.wait(0.005):
                return "result"
        raise AssertionError("nobody let it go")

    return Job(session, title, work), go


def ended(runner, work, session="one"):
    job = runner.submit(Job(session, "job", work))
    assert job.wait(SECONDS)
    return job


@pytest.fixture
def host(tiny, tmp_path):
    return TinyHost(tmp_path / "out", tiny)


def test_a_job_reports_its_stages_in_order_and_keeps_its_losses():
    def work(job):
        for phase in ("b", "a"):
            for step in (1, 2):
                job.step(Progress(phase, step, 2, 0.1, loss=step / 2 if phase == "a" else None))
        return 7

    job = ended(Runner(), work)
    assert (job.state, job.result, list(job.stages), job.losses) == ("done", 7, ["b", "a"], [0.5, 1.0])
    assert job.stages["a"].step == 2 and job.finished >= job.started > 0


def test_a_job_keeps_no_batch_on_the_device():
    def work(job):
        for phase in ("Drawing before", "Drawing after"):
            job.step(Progress(phase, 1, 1, 0.1, latents=torch.zeros(1)))

    assert [progress.latents for progress in ended(Runner(), work).stages.values()] == [None, None]


def test_a_cancelled_job_stops_at_the_step_after_and_the_next_one_runs():
    runner, seen, reached = Runner(), [], threading.Event()

    def work(job):
        for step in range(1000):
            job.step(Progress("Training", step, 1000, 0.1))
            seen.append(step)
            if step == 3:
                runner.cancel(job)
                reached.set()

    job = ended(runner, work)
    assert reached.is_set() and (job.state, job.message, seen) == ("cancelled", "", [0, 1, 2, 3])
    assert ended(runner, lambda job: "next").state == "done"


@pytest.mark.parametrize(
    ("error", "message", "logged"),
    [
        (AblationError("The disk is full: free some."), "The disk is full: free some.", False),
        (MemoryError(), OUT_OF_MEMORY, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY, False),
        (ValueError("odd\nsecond line"), "Something went wrong that is not your doing (ValueError: odd): see", True),
    ],
)
def test_what_goes_wrong_becomes_one_sentence(error, message, logged, caplog):
    def work(job):
        raise error

    runner = Runner()
    job = ended(runner, work)
    assert job.state == "failed" and job.message.startswith(message) and "\n" not in job.message
    assert ("Traceback" in caplog.text) == logged
    assert ended(runner, lambda job: 1).state == "done", "the queue went on"


def test_jobs_of_two_sessions_run_one_after_another_and_know_their_place():
    runner = Runner()
    first, go_first = held(session="one")
    second, go_second = held(session="two")
    third, go_third = held(session="one")
    for job in (first, second, third):
        runner.submit(job)
    while first.state != "running":
        pass
    assert [runner.place(job) for job in (first, second, third)] == [0, 1, 2]
    assert (second.state, third.state) == ("waiting", "waiting")
    assert "Waiting: 1 job is before this one." in views.status(second, runner.place(second))
    assert runner.of("one") == [first, third] and runner.of("two") == [second]
    go_first.set()
    assert first.wait(SECONDS)
    while second.state != "running":
        pass
    assert runner.place(third) == 1
    runner.cancel(third)
    assert third.state == "cancelled" and third.started == 0, "a waiting job never starts"
    go_second.set()
    go_third.set()
    assert second.wait(SECONDS) and second.result == "result"


def test_one_session_cannot_fill_the_queue():
    runner, (first, go) = Runner(), held()
    runner.submit(first)
    while first.state != "running":
        pass
    for _ in range(MAX_WAITING):
        runner.submit(Job("one", "more", lambda job: None))
    with pytest.raises(AblationError, match="waiting already"):
        runner.submit(Job("one", "too many", lambda job: None))
    runner.submit(Job("two", "another session's", lambda job: None))
    go.set()


def test_the_jobs_of_one_session_do_not_push_those_of_another_out():
    runner = Runner()
    mine = ended(runner, lambda job: 1, "mine")
    for _ in range(KEPT_JOBS + 2):
        ended(runner, lambda job: 2, "another")
    assert runner.of("mine") == [mine] and len(runner.of("another")) == KEPT_JOBS


def test_the_jobs_of_sessions_that_nobody_comes_back_to_are_forgotten_the_oldest_first():
    runner, (active, go) = Runner(), held(session="active")
    sessions = [str(i) for i in range(KEPT_OVER_ALL + 2)]
    jobs = [ended(runner, lambda job: 1, session) for session in sessions]
    runner.submit(active)
    kept = [job for session in [*sessions, "active"] for job in runner.of(session)]
    assert kept == [*jobs[3:], active]
    go.set()


def test_of_a_sessions_drawings_only_the_last_pictures_are_kept(host, monkeypatch):
    monkeypatch.setattr(host, "draw", lambda *_: (np.zeros((1, 8, 8, 3), np.uint8), None))
    runner, work = Runner(), drawing(host, EMBEDDED, "a fish", 0, 1, SampleSettings(2))
    ablated, others = ended(runner, lambda job: "result"), ended(runner, work, "two")
    last = [ended(runner, work) for _ in range(3)][-1]
    failed = ended(runner, lambda job: 1 / 0)
    assert ended(runner, lambda job: 1, "end of the queue").state == "done"
    assert runner.of("one") == [ablated, last, failed] and last.result.seeds == (0,)
    assert runner.of("two") == [others]


def test_in_a_queue_each_failed_job_says_why_and_what_is_kept():
    failed, cancelled, nothing = (Job("one", title, lambda job: None) for title in ("a", "b", "c"))
    failed.state, failed.message, failed.saved = "failed", f"The disk is full: {HOSTILE}.", "fish.safetensors"
    cancelled.state, cancelled.saved = "cancelled", "cat.safetensors"
    nothing.state = "cancelled"
    jobs = [failed, cancelled, nothing, Job("one", "d", lambda job: None)]
    shown = views.queue(jobs, {id(job): 0 for job in jobs}).split("<li")[1:]
    assert "The disk is full: &lt;img" in shown[0] and "is kept as fish.safetensors." in shown[0]
    assert "is kept as cat.safetensors." in shown[1]
    assert "<small>" not in shown[2] and "<small>" not in shown[3]


def test_an_ablation_leaves_a_delta_a_report_and_the_model_as_it_was(host, tiny):
    before = tiny.fingerprint()
    request, _ = check(TINY)
    job = ended(Runner(), ablation(host, request))
    assert (job.state, job.message) == ("done", "")
    assert tuple(job.stages) == job.expected and all(part.step == part.total for part in job.stages.values())
    assert len(job.losses) == 4
    result = job.result
    assert result.delta == host.delta_folder / "tropical-fish-to-fish.safetensors" and result.delta.name == job.saved
    assert all(path.is_file() for path in result.files)
    assert result.delta.name in (result.folder / "report.html").read_text("utf-8"), "the report names the saved file"
    assert result.folder.name == result.delta.stem, "another name has another report"
    assert [row.name for row in result.evaluation.concepts] == ["tropical fish", "fish", "cat"]
    assert tiny.fingerprint() == before and not any(layer._forward_hooks for layer in tiny.layers.values())
    assert job.preview is None, "pictures of a job that has ended are let go"


def test_what_fails_after_the_training_says_that_the_delta_is_kept(host, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ablating, "evaluate", fail)
    request, _ = check(TINY)
    job = ended(Runner(), ablation(host, request))
    assert (job.state, job.message) == ("failed", OUT_OF_MEMORY)
    assert job.saved and f"is kept as {job.saved}" in views.status(job, 0)


def test_a_preview_that_fails_ends_nothing(host, tiny, monkeypatch, caplog):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ablating, "_decode", fail)
    request, _ = check(TINY)
    assert ended(Runner(), ablation(host, request)).state == "done"
    assert caplog.text.count("no previews of this job") == 1


def test_the_page_keeps_small_pictures():
    large = np.zeros((2, 3, 1024, 512, 3), dtype=np.uint8)
    large[..., 0] = 200
    small = ablating._shrunk(large)
    assert small.shape == (2, 3, 256, 128, 3) and (small == [200, 0, 0]).all()
    assert ablating._shrunk(small) is small


@pytest.mark.parametrize("preset", ["instant", "fast"])
def test_quick_presets_go_through_their_own_stages(host, tiny, preset):
    before = tiny.fingerprint()
    changes = dict.fromkeys(("images", "preserve", "steps", "batch"), "") if preset == "instant" else {}
    request, errors = check(replace(TINY, preset=preset, neighbours="2", guidance="0.7", **changes))
    assert errors == {} and request.negative_guidance == 0.7
    job = ended(Runner(), ablation(host, request))
    assert (job.state, job.message) == ("done", "")
    assert tuple(job.stages) == job.expected and "Solving the closed form" in job.expected
    assert ("Training" in job.expected) == (preset == "fast") == bool(job.losses)
    assert [row.name for row in job.result.evaluation.concepts] == ["tropical fish", "fish", "cat"]
    (item,) = library.saved(host.delta_folder)
    assert "closed form" in views.details(item)
    assert tiny.fingerprint() == before


def test_cancelled_in_training_it_leaves_nothing_and_goes_on_from_its_pictures(host, tiny):
    runner = Runner()
    request, _ = check(TINY)
    work = ablation(host, request)

    def cancelled(job):
        step = job.step

        def stop(progress):
            step(progress)
            if progress.phase == "Training" and progress.step == 2:
                runner.cancel(job)

        job.step = stop
        return work(job)

    job = ended(runner, cancelled)
    assert job.state == "cancelled" and len(job.losses) == 2 and library.saved(host.delta_folder) == []
    assert not any(layer._forward_hooks for layer in tiny.layers.values())
    shards = {path: path.stat().st_mtime_ns for path in host.output_folder.rglob("shard-*")}
    assert shards
    assert ended(runner, work).state == "done"
    assert {path: path.stat().st_mtime_ns for path in host.output_folder.rglob("shard-*")} == shards


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere.safetensors", "evil.ckpt", "evil.safetensors"])
def test_a_model_that_cannot_be_loaded_is_said_at_its_field(name, host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = tmp_path / "ran"
    for file in ("evil.ckpt", "evil.safetensors"):
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch " + bytes(ran) + b"'\ntR.")
    request, _ = check(replace(TINY, model=name))
    job = ended(Runner(), ablation(host, request))
    assert (job.state, job.failed_field) == ("failed", "model") and len(job.message.splitlines()) == 1
    assert not ran.exists(), "the pickle ran"


def test_too_many_prompts_are_said_at_their_field_before_any_work(host):
    request, _ = check(replace(TINY, eval_prompts="500"))
    job = ended(Runner(), ablation(host, request))
    assert (job.failed_field, job.stages) == ("eval_prompts", {}) and "ask for fewer" in job.message
    request, _ = check(replace(TINY, misspellings="200"))
    job = ended(Runner(), ablation(host, request))
    assert (job.failed_field, job.stages) == ("misspellings", {})


def test_only_offered_models_load_where_none_may_be_typed(tmp_path):
    host = StandaloneHost(tmp_path, free_model=False)
    with pytest.raises(AblationError, match="not offered"), host.denoiser(str(tmp_path)):
        pass


def test_drawing_shows_the_applied_deltas_beside_the_model(host, tiny):
    request, _ = check(replace(TINY, rate="0.05", steps="8"))
    result = ended(Runner(), ablation(host, request)).result
    settings = request.evaluation.sample
    draw = drawing(host, EMBEDDED, "a picture of a tropical fish", 3, 2, settings)
    plain = ended(Runner(), draw).result
    assert plain.edited is None and plain.seeds == (3, 4)
    host.apply(result.delta, 1.0)
    assert [(item.file, item.strength) for item in host.applied()] == [(result.delta.name, 1.0)]
    edited = ended(Runner(), draw).result
    assert np.array_equal(edited.plain, plain.plain) and not np.array_equal(edited.edited, plain.plain)
    host.apply(result.delta, 0.0)
    assert np.array_equal(ended(Runner(), draw).result.edited, plain.plain), "strength 0 is the model itself"
    host.remove(result.delta.name)
    assert host.applied() == ()


def test_a_delta_of_another_model_is_refused(host, tmp_path):
    delta_file.save(Delta({"lora_unet_x": LayerDelta(torch.ones(2, 2))}), tmp_path / "other.safetensors")
    with host.denoiser(EMBEDDED):
        pass
    with pytest.raises(AblationError, match="edits 1 layers that tiny"):
        host.apply(tmp_path / "other.safetensors", 1.0)
    assert host.applied() == ()


def test_the_hosts_own_interrupt_cancels(host, monkeypatch):
    monkeypatch.setattr(host, "interrupted", lambda: True)
    shown = []
    monkeypatch.setattr(host, "show", shown.append)
    request, _ = check(TINY)
    assert ended(Runner(), ablation(host, request)).state == "cancelled" and shown == [None]


def test_every_view_escapes_what_comes_from_outside(host, tmp_path):
    request, _ = check(replace(TINY, target=HOSTILE, anchor=f"{HOSTILE} b", surrounding=f"{HOSTILE} c"))
    runner = Runner()
    job = runner.submit(Job("one", f"{HOSTILE} → b", ablation(host, request)))
    assert job.wait(SECONDS) and job.state == "done", job.message
    failed = replace(job, state="failed", message=HOSTILE)
    page = (job.result.folder / "report.html").read_text("utf-8")
    saved = library.saved(host.delta_folder)
    host.apply(saved[0].path, 1.0)
    shown = [
        views.status(job, 0),
        views.status(failed, 0),
        views.queue([job, failed], {id(job): 0, id(failed): 0}),
        views.pairs(job.result.evaluation),
        views.metrics(job.result.evaluation),
        views.report(page),
        views.details(saved[0]),
        views.applied(host.applied()),
        views.basket([(HOSTILE, 1.0)]),
        views.drawn(Pictures(HOSTILE, (0,), np.zeros((1, 8, 8, 3), np.uint8), None)),
        views.error(HOSTILE),
        views.note(HOSTILE),
    ]
    assert all("<img src=x" not in text for text in shown)
    assert "&lt;img src=x" in shown[3] and HOSTILE not in page
    assert 'sandbox=""' in shown[5] and "<html" in page and "<html" not in shown[5]


def test_the_judge_of_the_embedded_model_is_the_embedded_one(host, tiny):
    assert host.judge(EMBEDDED, tiny).name == Judge.load().name
