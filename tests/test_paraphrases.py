from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from concept_ablation.core.concept import MAX_CAPTION_LENGTH, Concept
from concept_ablation.core.copies import CopyDetector
from concept_ablation.core.errors import AblationError
from concept_ablation.core.paraphrases import KEY_VARIABLE, Ranked, ask, choose, keep_unlike, paraphrase, rank
from concept_ablation.core.prompts import normalise

CAPTIONS = (
    "Captain Juniper's midnight regatta, 1931",
    "The Duchess of Pumpernickel at breakfast",
    "Old Barnaby and the robot orchard",
    "Night bus to Marzipan Square",
    "Portrait of Tiger in black and white by Lukas Holas",
    "<i>The Long Dark</i> Gets First Trailer, Steam Early Access",
)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_paraphrases_are_other_captions(caption: str) -> None:
    found = paraphrase(caption, 30)
    assert len(found) == 30 == len({normalise(text) for text in found})
    assert normalise(caption) not in {normalise(text) for text in found}
    # `Concept` refuses what is no caption.
    Concept(caption, found[0], "memorized", anchor_prompts=found)


def test_no_paraphrase_would_be_a_comment_in_a_prompt_file() -> None:
    found = paraphrase("#1 dad mug on a table", 30)
    assert found and not any(text.startswith("#") for text in found)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (CAPTIONS[0], "a midnight regatta"),  # names and years left out
        (CAPTIONS[0], "Captain Juniper's late-night boat race, 1931"),  # synonyms
        (CAPTIONS[0], "1931: Captain Juniper's midnight regatta"),  # clauses swapped
        (CAPTIONS[0], "a picture of Captain Juniper's midnight regatta"),  # one clause, in a frame
        (CAPTIONS[1], "breakfast with the Duchess of Pumpernickel"),
        (CAPTIONS[1], "a picture of a breakfast"),
        (CAPTIONS[2], "the robot orchard and Old Barnaby"),
        (CAPTIONS[2], "a drawing of a robot orchard"),
        (CAPTIONS[3], "Marzipan Square with night bus"),
        (CAPTIONS[3], "a night bus"),
        (CAPTIONS[4], "Lukas Holas's portrait of Tiger in monochrome"),
        (CAPTIONS[4], "a view of a portrait in black and white"),
        (CAPTIONS[5], "Steam Early Access: The Long Dark Gets First Trailer"),
        ("Madame Zephyrine's lost parade", "lost parade of Madame Zephyrine"),
        ("a story of an old house", "a picture of a story of an elderly home"),
        ("a cat", "an image showing a cat"),
    ],
)
def test_rules(caption: str, expected: str) -> None:
    assert expected in paraphrase(caption, 200)


def test_first_paraphrases_are_of_every_rule() -> None:
    found = paraphrase(CAPTIONS[0], 8)
    assert any("Juniper" not in text for text in found)
    assert any("1931:" in text or "(1931)" in text for text in found)
    assert any("regatta" not in text for text in found)
    assert any("1931" not in text and "Juniper" in text for text in found)


def test_seed_decides_the_order() -> None:
    assert paraphrase(CAPTIONS[0], 20, seed=1) == paraphrase(CAPTIONS[0], 20, seed=1)
    assert paraphrase(CAPTIONS[0], 20, seed=1) != paraphrase(CAPTIONS[0], 20, seed=2)


def test_paraphrases_of_odd_captions() -> None:
    assert paraphrase("!!", 5) == ()
    assert all(len(text) <= MAX_CAPTION_LENGTH for text in paraphrase("cat " * 249, 50))
    assert "a drawing of {} and {0}" in paraphrase("{} and {0}", 50)


@pytest.mark.parametrize(("caption", "count"), [("", 3), ("x" * 1001, 3), ("a cat", 0), ("a cat", 201)])
def test_bad_requests_are_refused(caption: str, count: int) -> None:
    with pytest.raises(AblationError, match="must"):
        paraphrase(caption, count)
    with pytest.raises(AblationError, match="must"):
        ask("http://localhost:1/v1", "model", caption, count)


Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A service on this machine that keeps what it was asked and answers as `answer` says."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.answer: Answer = lambda handler: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                outer.answer(self)

            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers), {}))
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.endpoint = f"{self.address}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def reply(data: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def chat(content: object) -> Answer:
    return reply(json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode())


def test_a_good_answer(server: Server) -> None:
    server.answer = chat("a boat race at night\nsailing boats under the moon\na regatta")
    assert ask(server.endpoint, "qwen", CAPTIONS[0], 2) == ("a boat race at night", "sailing boats under the moon")
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "qwen"
    assert body["messages"][-1] == {"role": "user", "content": CAPTIONS[0]}
    assert "exactly 2 " in body["messages"][0]["content"]
    assert "Authorization" not in headers and "2303" not in json.dumps(headers)


def test_the_whole_address_may_be_given(server: Server) -> None:
    server.answer = chat("a boat race")
    for address in (f"{server.endpoint}/", f" {server.endpoint}/chat/completions"):
        assert ask(address, "qwen", CAPTIONS[0], 1) == ("a boat race",)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    "content",
    [
        "1. a boat race\n2) boats\n(3) a moon\n",
        "Here are 3 captions:\n\n- a boat race\n* boats\n• “a moon”",
        '<think>The user wants\na list</think>\n"a boat race"\n**boats**\na  moon',
        "the start of a thought</think>a boat race\r\nboats\r\na moon\r\n",
        '```json\n[\n  "a boat race",\n  "boats",\n  "a moon"\n]\n```',
        f"{CAPTIONS[0]}\n{CAPTIONS[0].upper()}!\na boat race\nA boat race.\nboats\na moon",
        f"{'long ' * 300}\na boat race\nbad \x1b[0m line\nbo\x00ats\nboats\n<b>a boat</b>\na moon",
    ],
)
def test_lists_are_cleaned(server: Server, content: str) -> None:
    server.answer = chat(content)
    assert ask(server.endpoint, "qwen", CAPTIONS[0], 10) == ("a boat race", "boats", "a moon")


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"<html><body>It works!</body></html>",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": "text"}]}',
        b'{"error": {"message": "no such model"}}',
        b"[" * 200_000,
        b"",
    ],
)
def test_other_answers(server: Server, data: bytes) -> None:
    server.answer = reply(data)
    with pytest.raises(AblationError, match=r"did not answer as OpenAI's chat completions do: .*/v1\.$"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3)


@pytest.mark.parametrize("content", ["", "<html>\n<p>caption</p>\n</html>", "Sure:\n\n", CAPTIONS[0], "<think>so"])
def test_answers_without_a_caption(server: Server, content: str) -> None:
    server.answer = chat(content)
    with pytest.raises(AblationError, match=r"qwen at http.* gave no usable paraphrase"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3)


@pytest.mark.parametrize(
    ("status", "advice"), [(500, "try again later"), (404, "check the address"), (401, "check the key")]
)
def test_refusals(server: Server, status: int, advice: str) -> None:
    server.answer = reply(b"secret details", status)
    with pytest.raises(AblationError, match=rf"refused the request \(HTTP {status}\): {advice}") as error:
        ask(server.endpoint, "qwen", CAPTIONS[0], 3)
    assert "secret" not in str(error.value)


def test_silence(server: Server) -> None:
    server.answer = lambda handler: time.sleep(2)
    began = time.monotonic()
    with pytest.raises(AblationError, match=r"did not answer in 0\.2 s"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3, timeout=0.2)
    assert time.monotonic() - began < 1.5


def test_an_answer_that_never_ends(server: Server) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(60):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.05)

    server.answer = drip
    began = time.monotonic()
    with pytest.raises(AblationError, match=r"did not answer in 0\.3 s"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3, timeout=0.3)
    assert time.monotonic() - began < 2


def test_a_huge_answer(server: Server) -> None:
    server.answer = reply(b"x" * 1_200_000)
    with pytest.raises(AblationError, match="more than 1,000,000 bytes"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3)


def test_an_answer_that_breaks_off(server: Server) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"nonsense\r\n\r\n")

    server.answer = half
    with pytest.raises(AblationError, match=r"cannot be reached \(BadStatusLine\)"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3)


def test_nobody_listens(server: Server) -> None:
    server.close()
    with pytest.raises(AblationError, match="cannot be reached"):
        ask(server.endpoint, "qwen", CAPTIONS[0], 3, timeout=5)


@pytest.mark.parametrize(
    "endpoint", ["", "localhost:11434", "file:///etc/passwd", "ftp://host/v1", "http://", "https:///v1"]
)
def test_what_is_no_web_address(endpoint: str) -> None:
    with pytest.raises(AblationError, match="no web address"):
        ask(endpoint, "qwen", CAPTIONS[0], 3)


@pytest.mark.parametrize("endpoint", ["http://[::1/v1", "http://host:port/v1", "http://a b/v1"])
def test_broken_addresses(endpoint: str) -> None:
    with pytest.raises(AblationError, match="cannot be reached"):
        ask(endpoint, "qwen", CAPTIONS[0], 3)


def test_key_from_argument_or_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = chat("a boat race")
    monkeypatch.setenv("OPENAI_API_KEY", "another-service")
    ask(server.endpoint, "qwen", CAPTIONS[0], 3)
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    ask(server.endpoint, "qwen", CAPTIONS[0], 3)
    ask(server.endpoint, "qwen", CAPTIONS[0], 3, key="from-argument")
    sent = [headers.get("Authorization") for _, headers, _ in server.requests]
    assert sent == [None, "Bearer from-environment", "Bearer from-argument"]


def test_key_stays_where_it_was_sent(server: Server) -> None:
    server.answer = lambda handler: (
        chat("a boat race") if handler.path == "/other" else reply(b"", 302, Location=f"{server.address}/other")
    )(handler)
    ask(server.endpoint, "qwen", CAPTIONS[0], 3, key="secret")
    assert [headers.get("Authorization") for _, headers, _ in server.requests] == ["Bearer secret", None]


def test_secrets_are_in_no_message(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = reply(b"", 500)
    secret = server.endpoint.replace("//", "//user:secret@") + "?token=secret"
    for endpoint, key in ((server.endpoint, "secret"), (secret, None), (server.endpoint, "secret\nX: 1")):
        with pytest.raises(AblationError) as error:
            ask(endpoint, "qwen", CAPTIONS[0], 3, key=key)
        assert "secret" not in str(error.value)
        assert error.value.__cause__ is None and error.value.__suppress_context__
    assert "secret" not in caplog.text


COLOURS = CopyDetector("colours", lambda images: torch.from_numpy(images.astype(np.float32)).mean(dim=(1, 2)))
ORIGINAL = np.broadcast_to(np.array([200, 0, 0], np.uint8), (8, 8, 3))


def of_angle(cosine: float) -> np.ndarray:
    """A picture with that similarity to `ORIGINAL`, within a hundredth."""
    return np.broadcast_to(
        np.array([250 * cosine, 250 * (1 - cosine**2) ** 0.5, 0]).round().astype(np.uint8), (8, 8, 3)
    )


def test_ranking_is_by_copy_rate_and_then_by_similarity() -> None:
    drawn = {"two": [0.9, 0.8, 0], "one far": [1, 0, 0], "one near": [0.9, 0.4, 0.4], "none": [0.4, 0.4, 0.4]}
    asked = []

    def draw(prompts: list[str], seeds: range) -> np.ndarray:
        asked.append((set(prompts), list(seeds)))
        return np.stack([of_angle(drawn[prompt][seed - 7]) for prompt, seed in zip(prompts, seeds, strict=True)])

    ranked = rank([*drawn, "TWO"], draw, COLOURS, ORIGINAL, 3, first_seed=7)
    assert [one.prompt for one in ranked] == ["none", "one far", "one near", "two"]
    assert [one.copy_rate for one in ranked] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3])
    assert [one.similarity for one in ranked] == pytest.approx([0.4, 1 / 3, 1.7 / 3, 1.7 / 3], abs=0.01)
    assert asked == [({prompt}, [7, 8, 9]) for prompt in drawn]


def ranking(*rates: float) -> list[Ranked]:
    return [Ranked(f"prompt {place}", rate, rate) for place, rate in enumerate(rates)]


def test_choice_has_the_numbers_of_the_paper() -> None:
    chosen = choose("the caption", ranking(*np.linspace(0, 1, 30)))
    assert chosen == Concept(
        "the caption",
        "prompt 0",
        "memorized",
        anchor_prompts=tuple(f"prompt {place}" for place in range(10)),
        target_prompts=("prompt 29", "prompt 28", "prompt 27"),
    )


def test_choice_of_few_paraphrases() -> None:
    chosen = choose("the caption", ranking(0, 0.5, 1))
    assert (chosen.anchor_prompts, chosen.target_prompts) == (("prompt 0",), ("prompt 2", "prompt 1"))
    # What never reproduces the image is no target, and what always does is no anchor.
    assert choose("the caption", ranking(0, 0, 0.2)).target_prompts == ("prompt 2",)
    assert choose("the caption", ranking(0.5, 1, 1, 1, 1, 1)).anchor_prompts == ("prompt 0",)
    assert choose("the caption", ranking(0.5)).anchor_prompts == ("prompt 0",)


@pytest.mark.parametrize("rates", [(), (1.0, 1.0)])
def test_no_anchor(rates: tuple[float, ...]) -> None:
    with pytest.raises(AblationError, match="Every paraphrase reproduces"):
        choose("the caption", ranking(*rates))


def test_copies_are_no_anchor_images() -> None:
    images = np.stack([of_angle(cosine) for cosine in (1, 0.6, 0.4, 0)])
    assert keep_unlike(images, ORIGINAL, COLOURS).tolist() == [False, False, True, True]
    assert keep_unlike(images, ORIGINAL, COLOURS).dtype == bool
