"""Jobs that take minutes: one at a time in a worker thread, the others in a queue, each watched and cancelled from
outside.

A page polls: it asks for a job's state whenever it wants to show it, so a slow or closed browser holds nothing up.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core.errors import AblationError, Interrupted, is_out_of_memory
from ..core.progress import Progress

State = Literal["waiting", "running", "done", "failed", "cancelled"]
KEPT_JOBS = 24
"""Finished jobs of one session that are kept for its page; older ones are forgotten (what they saved stays)."""
KEPT_OVER_ALL = 2 * KEPT_JOBS
"""Finished jobs of all sessions that are kept: those of a page to which nobody comes back would stay for ever."""
MAX_WAITING = 16
"""Jobs that one session may have waiting."""

OUT_OF_MEMORY = "Out of memory: lower the batch under Advanced, or choose a smaller subset or model."
_log = logging.getLogger(__name__)


class FieldError(AblationError):
    """An error that belongs to one field of the form."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.field = name


@dataclass(eq=False)
class Job:
    """One piece of work and where it is. Written by the worker thread, read by any."""

    session: str
    title: str
    work: Callable[[Job], Any] = field(repr=False)
    """Does the job and returns its result; must call `step` often and let what that raises pass."""
    id: int = field(default_factory=itertools.count(1).__next__)
    state: State = "waiting"
    stages: dict[str, Progress] = field(default_factory=dict)
    """The last progress of every phase so far, in the order in which they began."""
    expected: tuple[str, ...] = ()
    """The phases that it will go through, as soon as that is known."""
    losses: list[float] = field(default_factory=list)
    result: Any = field(default=None, repr=False)
    only_last: bool = False
    """Whether its result, because it is large, takes the place of the one before it in the session."""
    message: str = ""
    """Why it failed, in one sentence."""
    failed_field: str = ""
    """The field of the form that the message belongs to, if there is one."""
    saved: str = ""
    """Name of the delta that it saved, which stays even if the rest of the job is cancelled."""
    preview: Any = field(default=None, repr=False)
    """uint8 [N, height, width, 3]: what is being drawn."""
    started: float = 0.0
    finished: float = 0.0
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "running")

    @property
    def cancelling(self) -> bool:
        return self.state == "running" and self._cancelled.is_set()

    def step(self, progress: Progress) -> None:
        """Take note of progress: the callback that the work passes on to `core`.

        Raises:
            Interrupted: the job was cancelled.
        """
        if self._cancelled.is_set():
            raise Interrupted("Cancelled.")
        # the batch that is being drawn would stay on the device for as long as the job is kept
        self.stages[progress.phase] = replace(progress, latents=None)
        if progress.loss is not None:
            self.losses.append(progress.loss)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the job has ended, at most so long; whether it has."""
        return self._ended.wait(seconds)

    def run(self) -> None:
        """Do the work and turn what goes wrong into a sentence."""
        self.state, self.started = "running", time.time()
        try:
            self.result = self.work(self)
            self._end("done")
        except Interrupted:
            self._end("cancelled")
        except Exception as error:
            self.failed_field = error.field if isinstance(error, FieldError) else ""
            self._end("failed", explain(error))

    def cancel_waiting(self) -> None:
        self._end("cancelled")

    def request_cancel(self) -> None:
        self._cancelled.set()

    def _end(self, state: State, message: str = "") -> None:
        self.finished, self.message, self.preview = time.time(), message, None
        # last, because a page that sees the state will read the rest
        self.state = state
        self._ended.set()


def explain(error: Exception) -> str:
    """One sentence for the user; what is not theirs to mend also goes to the log, with its traceback."""
    if isinstance(error, AblationError):
        return str(error)
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    _log.error("a job failed", exc_info=error)
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"Something went wrong that is not your doing ({type(error).__name__}: {reason}): see the program's log."


class Runner:
    """The queue: jobs of all sessions, first come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._working = False

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue and see to it that the queue is worked off.

        Raises:
            AblationError: the session has too many waiting.
        """
        with self._lock:
            if sum(other.session == job.session for other in self._waiting) >= MAX_WAITING:
                raise AblationError(f"{MAX_WAITING} jobs are waiting already: let some of them end first.")
            self._forget_old(job.session, coming=1)
            self._waiting.append(job)
            self._jobs.append(job)
            if not self._working:
                self._working = True
                threading.Thread(target=self._work_off, name="concept-ablation-jobs", daemon=True).start()
        return job

    def of(self, session: str) -> list[Job]:
        """The session's jobs, oldest first."""
        with self._lock:
            return [job for job in self._jobs if job.session == session]

    def place(self, job: Job) -> int:
        """How many jobs, of whichever session, come before this one; 0 if it runs or has ended."""
        with self._lock:
            if job not in self._waiting:
                return 0
            running = sum(other.state == "running" for other in self._jobs)
            return self._waiting.index(job) + running

    def cancel(self, job: Job) -> None:
        """Take a waiting job out of the queue, or stop a running one at its next step."""
        with self._lock:
            job.request_cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                job.cancel_waiting()

    def _work_off(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working = False
                    return
                job = self._waiting.popleft()
                job.state = "running"
            job.run()
            with self._lock:
                self._forget_old(job.session)

    def _forget_old(self, session: str, coming: int = 0) -> None:
        """Let go of ended jobs, the oldest first: those of one session, so that `coming` more have room, and of all."""
        ended = [job for job in self._jobs if not job.active]
        own = [job for job in ended if job.session == session]
        large = [job for job in own if job.only_last and job.state == "done"]
        old = {
            *own[: max(0, len(own) + coming - KEPT_JOBS)],
            *large[:-1],
            *ended[: max(0, len(ended) + coming - KEPT_OVER_ALL)],
        }
        self._jobs = [job for job in self._jobs if job not in old]
