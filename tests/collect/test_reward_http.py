import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from upslope.collect.rewards import http as reward_http
from upslope.collect.rewards.calling import CallError, IndivisibleError
from upslope.collect.rewards.http import HttpReward, check_address
from upslope.collect.rewards.pool import RewardPool
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Reward
from upslope.errors import UsageError


class _Handler(BaseHTTPRequestHandler):
    """Answers as the path says; `server.asked` counts."""

    def do_POST(self):
        path = self.path.partition("?")[0]
        self.server.asked[path] += 1
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.last = request
        match path:
            case "/length":
                self._answer(200, {"scores": [None if not text else len(text) for text in request["completions"]]})
            case "/busy":
                self._answer(*((503, {}) if self.server.asked[path] < 3 else (200, {"scores": [1.0]})))
            case "/culprit":
                bad = "bad" in request["completions"]
                self._answer(
                    *((422, {"detail": "bad one"}) if bad else (200, {"scores": [1] * len(request["prompts"])}))
                )
            case "/moved":
                self._answer(307, {})
            case "/strange":
                self._answer(200, {"scores": ["1.0", float("nan"), 2.0]})
            case "/drop":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "/slow":
                self.server.finish.wait(30)
            case "/huge":
                self._answer(200, {"scores": [0.0] * 1000})
            case "/text":
                self._send(200, b"not json")
            case status:
                self._answer(int(status[1:]), {"detail": "no"})

    def _answer(self, status, document):
        self._send(status, json.dumps(document).encode())

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.asked, running.finish = Counter(), threading.Event()
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.finish.set()
        running.shutdown()
        thread.join()


def reward(server, path, seconds=30.0, outage=30.0):
    address = f"http://127.0.0.1:{server.server_port}{path}"
    return HttpReward(address=address, seconds=seconds, outage=outage, pause=0.001)


def test_an_endpoint_gets_prompts_completions_and_columns_and_gives_scores(server):
    address = f"http://127.0.0.1:{server.server_port}/length?version=1"
    with RewardPool([Reward(name="http", function=address, weight=2.0)], workers=1, deadline=60.0) as pool:
        scores = pool.score(["p", "q"], ["abc", ""], [{"answer": "x"}, {}])
    assert scores.parts["http"] == (3.0, NOT_APPLICABLE)
    assert scores.total == (6.0, None)
    assert server.last == {"prompts": ["p", "q"], "completions": ["abc", ""], "columns": {"answer": ["x", None]}}


def test_a_busy_server_is_asked_again(server):
    assert reward(server, "/busy")(["p"], ["a"]) == [1.0]
    assert server.asked["/busy"] == 3


@pytest.mark.parametrize(
    ("path", "attempts", "error", "text"),
    [
        ("/500", 4, CallError, "answered 500 Internal Server Error in 4 attempts"),
        ("/501", 1, IndivisibleError, "answered 501"),
        ("/400", 1, CallError, 'answered 400 Bad Request in one attempt: {"detail": "no"}'),
        ("/404", 1, IndivisibleError, "answered 404"),
        ("/401", 1, IndivisibleError, "answered 401"),
        ("/moved", 1, IndivisibleError, "redirections are not followed"),
        ("/drop", 4, CallError, "broke off in 4 attempts"),
        ("/text", 1, CallError, "what is no JSON"),
        ("/200", 1, CallError, 'must answer {"scores"'),
    ],
)
def test_failures_say_what_happened_and_whether_fewer_completions_may_help(server, path, attempts, error, text):
    before = server.asked[path]
    with pytest.raises(error) as caught:
        reward(server, path)(["p"], ["a"])
    assert text in str(caught.value)
    assert server.asked[path] - before == attempts


def test_a_server_that_does_not_answer_or_cannot_be_reached(server):
    with pytest.raises(CallError, match=r"did not answer within 0\.2 s"):
        reward(server, "/slow", seconds=0.2)(["p"], ["a"])
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        with pytest.raises(IndivisibleError, match=r"cannot be reached in \d+ attempts: ConnectionRefusedError"):
            HttpReward(address=address, seconds=30.0, outage=0.1, pause=0.001)(["p"], ["a"])


@pytest.mark.parametrize("path", ["/429", "/503"])
def test_an_overloaded_server_is_asked_for_as_long_as_an_outage_may_last(server, path):
    with pytest.raises(IndivisibleError, match=f"answered {path[1:]} .* in one attempt"):
        reward(server, path, outage=0.0)(["p"], ["a"])
    with pytest.raises(IndivisibleError, match=r"in \d+ attempts"):
        reward(server, path, outage=0.2)(["p"], ["a"])
    assert server.asked[path] > 5


def test_an_endpoint_that_is_back_after_its_deadline_has_scored(server):
    """The worker lives for deadline and outage together."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    later = threading.Event()

    def serve():
        later.wait(1.5)
        with ThreadingHTTPServer(("127.0.0.1", port), _Handler) as running:
            running.asked = Counter()
            running.timeout = 20.0
            running.handle_request()

    thread = threading.Thread(target=serve)
    thread.start()
    rewards = [Reward(name="http", function=f"http://127.0.0.1:{port}/length")]
    with RewardPool(rewards, workers=1, deadline=0.5, outage=20.0) as pool:
        assert pool.score(["p"], ["abc"], [{}]).total == (3.0,)
    thread.join()


def test_failures_are_outcomes_and_only_the_culprit_fails(server):
    here = f"http://127.0.0.1:{server.server_port}"
    rewards = [Reward(name=name, function=f"{here}/{name}") for name in ("culprit", "strange", "404", "huge")]
    with RewardPool(rewards, workers=1, deadline=60.0) as pool:
        parts = pool.score(["p"] * 3, ["a", "bad", "c"], [{}] * 3).parts
    assert parts["culprit"][::2] == (1.0, 1.0)
    assert isinstance(parts["culprit"][1], Failed)
    assert "422" in parts["culprit"][1].reason
    assert [isinstance(part, Failed) for part in parts["strange"]] == [True, True, False]
    assert all("404" in part.reason for part in parts["404"])
    assert server.asked["/404"] <= 2
    assert all("returned more scores" in part.reason for part in parts["huge"])


def test_a_huge_answer_is_not_read_to_the_end(server, monkeypatch):
    monkeypatch.setattr(reward_http, "LARGEST_ANSWER", 100)
    with pytest.raises(CallError, match="answered more than 100 bytes"):
        reward(server, "/huge")(["p"], ["a"])


def test_a_column_that_json_cannot_hold_is_said(server):
    with pytest.raises(IndivisibleError, match="cannot be written as JSON: TypeError"):
        reward(server, "/length")(["p"], ["a"], when=[{1, 2}])


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("ftp://example.org/a", "http://host:port/path"),
        ("file:///etc/passwd", "http://host:port/path"),
        ("http://", "http://host:port/path"),
        ("http://example.org:99999/", "Port out of range"),
        ("https://name:word@example.org/", "no user name"),
    ],
)
def test_other_addresses_are_refused(address, text):
    with pytest.raises(UsageError, match=text):
        check_address(address)
