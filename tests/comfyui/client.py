"""A client of a ComfyUI server: queues graphs over HTTP, follows them over the websocket, and keeps what it heard."""

from __future__ import annotations

import contextlib
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from concept_ablation.tests.comfyui.graph import Graph

PROGRESS = "concept_ablation.progress"
# https://docs.comfy.org/development/comfyui-server/comms_messages: 1 is a preview, after 4 bytes of its image type
_PREVIEW, _HEADER = 1, 8
_ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}

OnMessage = Callable[[str, dict[str, Any]], None]
# The tests talk to this machine; a proxy of the environment is for other hosts.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Refused(Exception):
    """The server did not accept a graph; `answer` is its JSON."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.answer = answer


@dataclass
class Run:
    """All that was heard of one queued graph, in the order in which it came."""

    prompt_id: str
    status: str = ""
    """success, error or interrupted."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Node id -> what the node shows, of nodes that show something."""
    executed: list[str] = field(default_factory=list)
    """Ids of nodes that ran, as against `cached`."""
    cached: list[str] = field(default_factory=list)
    error: dict[str, Any] = field(default_factory=dict)
    bars: list[tuple[str, float, float]] = field(default_factory=list)
    """(node id, value, maximum) of every move of a progress bar."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """The pack's own websocket events."""
    previews: list[bytes] = field(default_factory=list, repr=False)
    """Image files."""
    seconds: float = 0.0

    def text(self, node: str) -> str:
        """The text that a node shows."""
        return "".join(self.outputs[node]["text"])

    @property
    def message(self) -> str:
        """The message of the error that ended the run."""
        return self.error.get("exception_message", "").strip()

    def losses(self, node: str) -> list[float]:
        """The losses that the events of a node told; not of every step, as events are sent a few times a second."""
        return [event["loss"] for event in self.events if event["node"] == node and event["loss"] is not None]


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the server at host:port."""
    name = uuid.uuid4().hex
    with connect(f"ws://{address}/ws?clientId={name}", max_size=None, proxy=None) as socket:
        yield Client(address, name, socket)


class Client:
    """One connection, with the id under which the server knows it."""

    def __init__(self, address: str, client_id: str, socket: ClientConnection) -> None:
        self._address = address
        self._id = client_id
        self._socket = socket
        self._info: dict[str, Any] = {}

    def get(self, path: str, **query: str) -> bytes:
        with _open(f"http://{self._address}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, content: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://{self._address}{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read() or b"{}")) from error

    def json(self, path: str) -> Any:
        """What the server answers to a path, read as JSON."""
        return json.loads(self.get(path))

    def object_info(self) -> dict[str, Any]:
        """Every node that the server has, with its inputs and outputs."""
        return self.json("/object_info")

    def interrupt(self) -> None:
        """What the front end's Cancel button sends."""
        self.post("/interrupt", {})

    def wait_until_idle(self, timeout: float = 120) -> None:
        """Wait until no graph runs or waits, whoever queued it.

        Raises:
            TimeoutError: it takes longer.
        """
        end = time.monotonic() + timeout
        while any(self.json("/queue").values()):
            if time.monotonic() > end:
                raise TimeoutError("a graph still runs")
            time.sleep(0.1)

    def picture(self, shown: dict[str, str]) -> np.ndarray:
        """An image that a node shows, uint8 [H, W, 3]."""
        return np.asarray(Image.open(io.BytesIO(self.get("/view", **shown))).convert("RGB"))

    def pictures(self, run: Run, node: str) -> np.ndarray:
        """All images that a node shows, uint8 [N, H, W, 3]."""
        return np.stack([self.picture(shown) for shown in run.outputs[node]["images"]])

    def run(self, graph: Graph | dict[str, Any], on_message: OnMessage | None = None, timeout: float = 300) -> Run:
        """Queue a graph and follow it to its end.

        Args:
            graph: in API form; inputs that are left out get the default that the server names.
            on_message: called with the type and data of each JSON message of this run.
            timeout: seconds until TimeoutError.

        Raises:
            Refused: the server found the graph wrong.
        """
        nodes = graph.nodes if isinstance(graph, Graph) else graph
        start = time.monotonic()
        answer = self.post("/prompt", {"prompt": self.with_defaults(nodes), "client_id": self._id})
        run = Run(json.loads(answer)["prompt_id"])
        while not self._hear(run, on_message, start + timeout - time.monotonic()):
            pass
        run.seconds = time.monotonic() - start
        return run

    def with_defaults(self, nodes: dict[str, Any]) -> dict[str, Any]:
        """The graph with every required input that it leaves out, where the server names a default."""
        self._info = self._info or self.object_info()
        filled = {}
        for name, node in nodes.items():
            known = self._info.get(node["class_type"], {"input": {}})["input"].get("required", {})
            # a V1 choice has no default but its first
            defaults = {
                key: options[0]["default"] if options and "default" in options[0] else kind[0]
                for key, (kind, *options) in known.items()
                if (options and "default" in options[0]) or (isinstance(kind, list) and kind)
            }
            filled[name] = {**node, "inputs": {**defaults, **node["inputs"]}}
        return filled

    def _hear(self, run: Run, on_message: OnMessage | None, seconds: float) -> bool:
        """Take in one message. Returns whether it was the last of the run."""
        message = self._socket.recv(timeout=max(seconds, 0))
        if isinstance(message, bytes):
            if int.from_bytes(message[:4], "big") == _PREVIEW:
                run.previews.append(message[_HEADER:])
            return False
        kind, data = (content := json.loads(message))["type"], content["data"]
        if data.get("prompt_id", run.prompt_id) != run.prompt_id:
            return False
        if kind == "executed":
            run.outputs[data["node"]] = data["output"] or {}
        elif kind == "executing" and data["node"] is not None:
            run.executed.append(data["node"])
        elif kind == "execution_cached":
            run.cached += data["nodes"]
        elif kind == "progress":
            run.bars.append((data["node"], data["value"], data["max"]))
        elif kind == PROGRESS:
            run.events.append(data)
        elif kind in _ENDS:
            run.status = _ENDS[kind]
            run.error = data if run.status == "error" else {}
        if on_message is not None:
            on_message(kind, data)
        # the server's last word on a graph, whatever became of it
        return kind == "executing" and data["node"] is None and "prompt_id" in data
