"""One job on several processes: which rows each of them does, and what they tell one another.

A launcher (`accelerate launch`, `torchrun`) starts the same command several times, on one machine or on several. Every
process loads the model and draws the same plan from the same seeds, computes its share of the rows, and the shares are
put together: gradients by a sum after each step, latents and images by a copy to everyone. So all of them go the same
way, and a run with the same global batch gives the same delta on one process or on many, but for the order of sums.
Process 0 writes the files.

The rest of `core` asks `current()`, which is `ALONE` unless a face has entered `joined()`: one process that has all
rows and communicates with nobody.

A process that fails leaves its reason in the launcher's store. The others look there whenever they wait, so that none
waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import AblationError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another one that has not said that it stopped."""
_POLL, _LOOK = 0.0005, 0.2
_LINGER = 5.0
_STOPPED, _LEFT = "stopped", "left"


class PeerStopped(AblationError):
    """Another process of the job has stopped, and this one with it."""

    def __init__(self, message: str, here: bool) -> None:
        super().__init__(message)
        self.here = here
        """Whether that process runs on this machine, where its own message can be read."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: number of this process; 0 is the one that writes files.
        size: how many there are.
        store: where they leave notes for one another; None for one process.
    """

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def mine(self, rows: Tensor) -> Tensor:
        """This process's share of the rows of a step, [N, …] -> [about N / size, …]: every size-th one.

        Raises:
            AblationError: there are fewer rows than processes.
        """
        if len(rows) < self.size:
            raise AblationError(
                f"A training step needs a row for each of the {self.size} processes and has {len(rows)}: start fewer "
                "processes, or raise the batch."
            )
        return rows[self.rank :: self.size] if self.size > 1 else rows

    def count(self, rows: int) -> int:
        """How many of the first `rows` rows of a step are in this process's share."""
        return len(range(self.rank, rows, self.size))

    def part(self, mean: Tensor, own: int, rows: int) -> Tensor:
        """What a scalar mean over this process's `own` of `rows` rows contributes to the mean over all of them: the
        sum of it over the processes is that mean, also where shares differ in size. Without own rows it is 0.
        """
        if own == rows:
            return mean
        return mean * (own / rows) if own else mean.new_zeros(())

    def total(self, part: Tensor) -> Tensor:
        """Sum of a scalar over the processes, through which gradients flow: for what is not linear in a mean."""
        return part if self.size == 1 else _Total.apply(part, self)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, elementwise and without gradients; this process waits for the others.

        Raises:
            PeerStopped: one of them has stopped, or does not answer.
        """
        if self.size == 1:
            return values
        values = values.detach().clone()
        with self._explained():
            self._wait(dist.all_reduce(values, async_op=True))
        return values

    def begin_alike(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of process 0: solvers of different machines round differently."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        with self._explained():
            self._wait(dist.broadcast(flat, 0, async_op=True))
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def require_same(self, text: str, what: str) -> None:
        """Raise AblationError unless all processes have the same text; `what` it is completes "differ in …"."""
        if self.size == 1:
            return
        theirs = self.send({"text": _bytes(text)} if self.first else None, 0)["text"]
        differs = torch.tensor([float(not torch.equal(theirs, _bytes(text)))])
        if self.sum(differs).item():
            raise AblationError(
                f"The processes differ in {what}: start all of them with the same command and the same model files."
            )

    def spread(
        self, items: Sequence[int], make: Callable[[int], Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, Mapping[str, Tensor], bool]]:
        """`make` of every item, in order, each called by one process and given to all.

        The items are made in rounds of one per process, so that what is done can be kept as the work goes on.

        Yields:
            The item, its tensors (on the CPU, unless there is one process), and whether this process made them.
        """
        for start in range(0, len(items), self.size):
            round_ = items[start : start + self.size]
            made = make(round_[self.rank]) if self.rank < len(round_) else None
            for owner, item in enumerate(round_):
                own = owner == self.rank
                yield item, self.send(made if own else None, owner), own

    def stop(self, error: BaseException) -> bool:
        """Tell the others why this process stops; False if another one had stopped before."""
        if self.store is None:
            return True
        note = {"rank": self.rank, "host": socket.gethostname(), "reason": str(error) or type(error).__name__}
        with contextlib.suppress(RuntimeError):
            written = json.dumps(note)
            return self.store.compare_set(_STOPPED, "", written).decode() == written
        return False

    def peer_stopped(self) -> PeerStopped:
        """The error that says which process has stopped, and why, as far as it has told."""
        with contextlib.suppress(RuntimeError):
            deadline = time.monotonic() + _LINGER
            while time.monotonic() < deadline and not self.store.check([_STOPPED]):
                time.sleep(_LOOK)
            if not self.store.check([_STOPPED]):
                return _unexplained(self.size)
            note = json.loads(self.store.get(_STOPPED))
            message = f"Process {note['rank']} of {self.size} on {note['host']} stopped: {note['reason']}"
            return PeerStopped(message, note["host"] == socket.gethostname())
        return _unexplained(self.size)

    def leave(self, failed: bool) -> None:
        """End communication. The process that keeps the store stays until the others have left, but not for long."""
        # PyTorch before 2.7 has no abort for a group
        with contextlib.suppress(RuntimeError, AttributeError):
            if failed:
                # what is still under way would never end
                dist.group.WORLD.abort()
        with contextlib.suppress(RuntimeError):
            self.store.add(_LEFT, 1)
            deadline = time.monotonic() + _LINGER
            while self.first and time.monotonic() < deadline and self.store.add(_LEFT, 0) < self.size:
                time.sleep(0.01)
        dist.destroy_process_group()

    def send(self, tensors: Mapping[str, Tensor] | None, owner: int) -> Mapping[str, Tensor]:
        """The tensors of the process `owner` on every process's CPU; the others give None."""
        if self.size == 1 and tensors is not None:
            return tensors
        own = {} if tensors is None else {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        described = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in own.items()
        ]
        head = _bytes(json.dumps(described))
        length = torch.tensor([len(head)])
        with self._explained():
            self._wait(dist.broadcast(length, owner, async_op=True))
            head = head if tensors is not None else torch.empty(int(length), dtype=torch.uint8)
            self._wait(dist.broadcast(head, owner, async_op=True))
            received = {}
            for name, dtype, shape in json.loads(bytes(head.tolist())):
                received[name] = own[name] if name in own else torch.empty(shape, dtype=getattr(torch, dtype))
                if received[name].numel():
                    self._wait(dist.broadcast(received[name].view(-1).view(torch.uint8), owner, async_op=True))
        return received

    def _wait(self, work: dist.Work) -> None:
        """Wait for a communication, looking up from time to time whether a process has stopped."""
        look = time.monotonic() + _LOOK
        while not work.is_completed():
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK
                if self.store.check([_STOPPED]):
                    raise self.peer_stopped()
            time.sleep(_POLL)
        work.wait()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Communication within the block fails with PeerStopped."""
        try:
            yield
        except RuntimeError as error:
            raise self.peer_stopped() from error


ALONE = Processes()
"""One process that does everything."""

_current: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def current() -> Processes:
    """The processes that work on this job."""
    return _current.get()


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Within the block, work as one of the processes that a launcher has started, or alone if there was none.

    GPUs talk over NCCL and each process takes the one of its local rank; everything else, and GPUs that processes
    share, over gloo.

    Args:
        timeout: how long to wait for a process that gives no sign.

    Raises:
        AblationError: the other processes cannot be reached.
        PeerStopped: one of them has stopped; it has said why itself.
    """
    if not is_launched():
        yield ALONE
        return
    processes = _join(timeout)
    token = _current.set(processes)
    failed = True
    try:
        yield processes
        processes.sum(torch.zeros(1))
        failed = False
    except PeerStopped:
        raise
    except AblationError as error:
        if processes.stop(error):
            raise
        raise processes.peer_stopped() from error
    except BaseException as error:
        processes.stop(error)
        raise
    finally:
        _current.reset(token)
        processes.leave(failed)


class Gradients:
    """The gradients of a delta. On several processes they are views of one buffer, which is summed by one call."""

    def __init__(self, parameters: Sequence[Tensor], processes: Processes) -> None:
        self._processes = processes
        self._views: list[tuple[Tensor, Tensor]] = []
        if processes.size > 1:
            sizes = [parameter.numel() for parameter in parameters]
            self._flat = torch.zeros(sum(sizes), device=parameters[0].device)
            parts = self._flat.split(sizes)
            self._views = [(p, part.view_as(p)) for p, part in zip(parameters, parts, strict=True)]

    def clear(self) -> None:
        """Begin a step whose gradients will be summed. Nothing to do for one process."""
        if self._views:
            self._flat.zero_()
            for parameter, view in self._views:
                parameter.grad = view

    def reduce(self) -> None:
        """Sum over the processes what the backward pass has left.

        Raises:
            PeerStopped: one of them has stopped.
        """
        if not self._views:
            return
        with self._processes._explained():
            work = dist.all_reduce(self._flat, async_op=True)
            if self._flat.is_cuda and "nccl" in dist.get_backend_config():
                work.wait()  # the stream waits, not the host
            else:
                self._processes._wait(work)


class _Total(torch.autograd.Function):
    """y = sum over processes of x. Every process's loss f(y) is the same, so d(sum of losses)/dx is size * df/dy."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, processes: Processes) -> Tensor:
        ctx.size = processes.size
        return processes.sum(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def _join(timeout: timedelta) -> Processes:
    from torch.distributed.rendezvous import rendezvous

    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = "cpu:gloo,cuda:nccl" if here <= gpus else "gloo"
    if gpus:
        torch.cuda.set_device(local % gpus)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        notes = dist.PrefixStore("concept_ablation", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AblationError(
            f"The other processes cannot be reached ({str(error).splitlines()[0]}): start the command with accelerate "
            "launch or torchrun, and check the address and port of the first machine."
        ) from error
    return Processes(rank, size, notes)


def _unexplained(size: int) -> PeerStopped:
    minutes = TIMEOUT.total_seconds() / 60
    return PeerStopped(
        f"One of the {size} processes ended or did not answer for {minutes:.0f} minutes, and did not say why: read the "
        "messages of the others, then run the command again to go on.",
        False,
    )


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
