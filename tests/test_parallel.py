"""Several processes over gloo on the CPU: the same delta as one, one file writer, and an end when one of them fails."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from concept_ablation.core import delta_file
from concept_ablation.core.delta import merge
from concept_ablation.core.errors import AblationError
from concept_ablation.core.parallel import ALONE, Processes, current
from concept_ablation.tests.conftest import unavailable

SCRIPT = Path(__file__).with_name("run_on_processes.py")


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(server.getsockname()[1]) for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes, run to their end."""
    folder = tmp_path_factory.mktemp("processes")
    ports = free_ports(8)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | world | {"RANK": rank, "LOCAL_RANK": rank}
        log = (folder / f"{rank}.log").open("w", encoding="utf-8")
        command = [sys.executable, str(SCRIPT), str(folder), *ports]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 9], [(folder / f"{rank}.log").read_text("utf-8") for rank in (0, 1)]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What the two processes wrote down."""
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def test_two_processes_give_the_delta_of_one(found):
    first = found[0]
    for name, apart in first["apart"].items():
        alone, together = first["alone"][name], first["together"][name]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-6), name
        assert alone["norm"] > 1e-2 and apart < 1e-3 * alone["norm"], name
    assert min(first["together"]["loss-max"]["losses"]) > 0, "the baseline was past its clamp and tested nothing"


def test_both_hold_the_same_delta_to_the_last_bit(found):
    assert [process["together"]["alike"] for process in found] == [[0.0] * 3] * 2, "they begin with process 0's"
    assert found[0]["digests"] == found[1]["digests"]
    assert len(set(found[0]["digests"].values())) == len(found[0]["digests"])


def test_rows_and_images_are_those_of_one_process(found):
    for kind in ("data", "images"):
        assert found[0]["together"][kind] == found[0]["alone"][kind] == found[1]["together"][kind]
    assert all(done == total for done, total in (process["together"]["progress"] for process in found))


def test_the_first_process_alone_writes_files(folder):
    written = {path.name for path in (folder / "dataset").iterdir()}
    assert written == {"manifest.json", *(f"shard-{number:05d}.safetensors" for number in range(4))}
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("cancelled", "Interrupted", "cancelled here"),
        ("defect", "ZeroDivisionError", "a defect"),
        ("diverged", "Diverged", "lower the learning rate"),
        ("few rows", "AblationError", "each of the 2 processes and has 1"),
        ("other settings", "AblationError", "The processes differ in model, concepts or settings"),
        ("unwritable", "AblationError", "Cannot write"),
    ],
)
def test_a_failure_ends_both_and_is_said_once(name, kind, said, found):
    failures = [process["failures"][name] for process in found]
    own, told = sorted(failures, key=lambda failure: failure[0] == "PeerStopped")
    assert own[0] == kind and told[0] == "PeerStopped"
    assert said in own[1] and own[1] in told[1] and "\n" not in told[1]
    assert f"Process {failures.index(own)} of 2 on " in told[1]


def test_a_process_that_is_killed_ends_the_other(found):
    kind, said, _ = found[0]["failures"]["killed"]
    assert kind == "PeerStopped" and "ended or did not answer" in said
    assert "killed" not in found[1]["failures"]


def test_no_process_waits_for_one_that_is_gone(found):
    """Far from the 30 minutes after which a silent process is given up."""
    assert all(seconds < 300 for process in found for _, _, seconds in process["failures"].values())


def test_accelerate_launches_one_ablation_on_two_processes(tmp_path):
    """The README's command, on a machine without GPUs."""
    if importlib.util.find_spec("accelerate") is None:
        unavailable("there is no accelerate: pip install accelerate")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    command = ["concept_ablation.cli", "ablate", "--target", "rooster", "--anchor", "bird", "--preset", "paper"]
    small = ["--images", "2", "--steps", "3", "--batch", "4", "--eval-prompts", "1", "--eval-seeds", "1"]
    said, made = {}, {}
    for name, start in (("one", []), ("two", launcher)):
        ran = subprocess.run(
            [sys.executable, "-m", *start, *command, *small, "--precision", "fp32", "--output", str(tmp_path / name)],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr
        said[name], made[name] = ran.stdout, delta_file.load(tmp_path / name / "delta.safetensors")
    apart = merge([(made["one"], 1.0), (made["two"], -1.0)]).norm()
    assert made["one"].norm() > 1e-2 and apart < 1e-2 * made["one"].norm()
    assert said["two"].count("report.html") == 1, "the first process alone prints"
    assert list_of(tmp_path / "one") == list_of(tmp_path / "two")


def list_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_one_process_has_everything():
    rows, loss = torch.arange(5), torch.tensor(2.0, requires_grad=True)
    assert current() is ALONE and ALONE.first
    assert ALONE.mine(rows) is rows and ALONE.count(5) == 5
    assert ALONE.part(loss, 5, 5) is loss and ALONE.total(loss) is loss and ALONE.sum(rows) is rows
    made = list(ALONE.spread([3, 1], lambda item: {"x": rows * item}))
    assert [item for item, _, _ in made] == [3, 1] and all(own for _, _, own in made)
    assert made[0][1]["x"].tolist() == [0, 3, 6, 9, 12]


def test_shares_cover_all_rows_once_and_their_parts_add_up():
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    group = [Processes(rank, 3) for rank in range(3)]
    shares = [process.mine(rows) for process in group]
    assert sorted(torch.cat(shares).tolist()) == rows.tolist()
    assert [len(share) for share in shares] == [process.count(5) for process in group] == [2, 2, 1]
    parts = [process.part(share.mean(), len(share), 5) for process, share in zip(group, shares, strict=True)]
    assert sum(parts).item() == pytest.approx(rows.mean().item())
    assert group[2].part(rows[:0].mean(), 0, 2).item() == 0
    with pytest.raises(AblationError, match="each of the 3 processes and has 2"):
        group[0].mine(rows[:2])
