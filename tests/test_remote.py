"""The agent with a model behind a URL (extras/remote_agent.py): a server on this machine replies what a test says."""
import base64
import http.server
import io
import json
import threading
import time

import av
import numpy as np
import pytest
import remote_agent
from remote_agent import RemoteModel
from test_agent import COLOURS, OPTIONS, call, clip, feedback, final, run_main

import mcr_agent
from m2la import UserError
from mcr_agent import Budget, run_agent


@pytest.fixture
def server():
    """Answers each request with the next of `replies`: a text, an HTTP status, or bytes as they are. Keeps requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append((self.path, dict(self.headers), body))
            reply = served.replies.pop(0) if served.replies else "…"
            if callable(reply):
                reply = reply()
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            if isinstance(reply, str):
                reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.wfile.write(reply if isinstance(reply, bytes) else b"")

        def log_message(self, *_):
            pass
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.handle_error = lambda *_: None                                # a client that has gone
    served.requests, served.replies, served.url = [], [], f"http://127.0.0.1:{served.server_port}/v1"
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def test_the_command_asks_the_model_behind_the_url(clip, tmp_path, server, monkeypatch, capsys):
    server.replies = ["it is Speech", call("asr", start=33, end=37) + "</tool_call> and more",
                      call("view", start=33, end=35), final("red (A)"), "I would say: support"]
    monkeypatch.setenv("MCR_API_KEY", "secret")
    monkeypatch.setattr(mcr_agent, "find_model", lambda *_: pytest.fail("a local model"))
    trace = tmp_path / "t.jsonl"
    code, out, _ = run_main(monkeypatch, capsys, remote_agent, clip, "What colour is it at 34 seconds?",
                            "--options", *OPTIONS,
                            "--url", server.url + "/", "--api-model", "big", "--coarse", 4, "--trace", trace,
                            "--temperature", 0.7, "--seed", 3)
    assert code == 0 and "answer: red (A)\nevidence: 33 to 35 seconds\nverdict: support, confidence unknown" in out
    assert out.index("speech 1.00") < out.index("view start=33") and "secret" not in trace.read_text() + out
    assert len(server.requests) == 5 and server.replies == []
    path, headers, body = server.requests[3]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "big"
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["role"] for m in body["messages"]] == roles
    assert '"name": "temporal_grounding"' in body["messages"][0]["content"]
    assert body["messages"][2]["content"].endswith('"end": 37}}\n')
    assert "<tool_response>\n34.0 to 36.0: the word is maple\n" in body["messages"][3]["content"][0]["text"]
    seen = body["messages"][5]["content"]
    assert [p["text"] for p in seen if p["type"] == "text"] == [
        "<33.0 seconds>", "<33.5 seconds>", "<34.0 seconds>", "<34.5 seconds>",
        "<tool_response>\n33 to 35 seconds.\n</tool_response>"]
    data = base64.b64decode(seen[1]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    with av.open(io.BytesIO(data)) as image:                             # it is the frame: red from 20 to 40 seconds
        pixel = next(image.decode(video=0)).to_ndarray(format="rgb24")[28, 28]
    assert np.abs(pixel - np.array(COLOURS["red"])).max() < 20
    assert len(server.requests[4][2]["messages"]) == 1                                    # the second look, alone
    assert [(r[2]["temperature"], r[2].get("seed")) for r in server.requests[2:]] == [(0.7, 3)] * 2 + [(0, None)]


def test_captions_by_a_url_are_not_the_rollouts_tokens(clip, tmp_path, server, monkeypatch, capsys):
    spent = []
    for _ in range(2):                                                   # the second run has its captions already
        before = len(server.requests)
        code, out, _ = run_main(monkeypatch, capsys, remote_agent, clip, "What is it?", "--url", server.url,
                                "--api-model", "big",
                                "--coarse", 4, "--calls", 2, "--memory", tmp_path, "--trace", tmp_path / "t.jsonl")
        end = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[-1])
        spent.append((end["tokens"], len(server.requests) - before))
    assert code == 0 and spent[0][0] == spent[1][0] and spent[0][1] > spent[1][1] > 0


def test_a_url_that_answers_nothing_is_an_error(clip, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, remote_agent, clip, "What is it?", "--url", "http://127.0.0.1:9/v1",
                              "--api-model", "big", "--coarse", 4)
    assert code == 2 and "Connection refused" in out
    assert err == "error: --url http://127.0.0.1:9/v1: answered no request; see the steps above\n"


@pytest.mark.parametrize("reply, reason", [
    (500, "HTTP Error 500"), (307, "HTTP Error 307"), (b"<html>", "JSONDecodeError"), (b"[]", "TypeError"),
    (b'{"choices": []}', "IndexError"), (b'{"choices": [{"message": {"content": 5}}]}', "TypeError"),
    ("hang", "TimeoutError")])
def test_a_server_that_fails_ends_the_rollout_honestly(clip, server, reply, reason):
    model, ended = RemoteModel(server.url, "big"), threading.Event()

    def last():                                                          # the next reply never comes
        model.timeout = 0.1
        return call("view", start=33, end=35)
    second = call("view", start=33, end=35)
    if reply == "hang":
        second, reply = last, lambda: "late" if ended.wait(60) else "too late"
    server.replies = ["temporal", second, reply]
    result = run_agent(model, clip, "What colour?", OPTIONS)
    ended.set()
    assert (result.answer, result.budget_exhausted, result.evidence) == ("not found", "model", [])
    assert reason in feedback(result, 1) and len(server.requests) == 3
    assert "(the model failed)" in mcr_agent.describe_record(result.trace[-1])


def test_a_server_that_nobody_runs_and_one_that_talks_too_much(clip, server):
    with pytest.raises(UserError, match="--url ftp://x"):
        RemoteModel("ftp://x", "big")
    model = RemoteModel("http://127.0.0.1:9/v1", "big")
    result = run_agent(model, clip, "What?", OPTIONS)
    assert (result.answer, result.budget_exhausted, result.steps) == ("not found", "model", 0)
    server.replies = ["word " * 10 ** 5] * 30
    model, budget = RemoteModel(server.url, "big"), Budget(calls=3, tokens=99_000)
    result = run_agent(model, clip, "What?", OPTIONS, budget=budget)
    assert (result.answer, result.budget_exhausted, result.steps) == ("not found", "calls", 3)
    assert result.tokens < 99_000
