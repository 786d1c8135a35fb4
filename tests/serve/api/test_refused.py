"""A thousand requests that are wrong somewhere: each gets a 4xx with the body of its interface, and none a 500."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import socket
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from kiln.exporter.serve import web
from kiln.exporter.serve.app import application, page_files
from kiln.exporter.serve.settings import Settings
from tests.conftest import WAIT
from tests.serve.conftest import KEY, Running, Script

HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
# What is right, and the values that are wrong for each field: for every type below another one is taken, too.
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "gemma", "messages": [USER], "temperature": 1.0, "top_p": 0.9, "top_k": 3, "n": 1, "max_tokens": 3, "seed": 3,
            "stop": ["x"],
        "stream": False, "tools": [TOOL], "logit_bias": {"5": 1.0}, "logprobs": True, "top_logprobs": 2, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "response_format": {"type": "text"}, "reasoning_effort": "low",
        "stop_token_ids": [7], "min_tokens": 1, "ignore_eos": False, "parallel_tool_calls": True, "cache_salt": "x",
        "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 4, "max_completion_tokens": 4, "stream_options": {},
    },
    "/v1/completions": {
        "model": "gemma", "prompt": "x", "max_tokens": 3, "echo": False, "logprobs": 1, "n": 1, "best_of": 1, "temperature": 1.0, "seed": 1,
        "stop": "x", "stream": False,
    },
    "/v1/responses": {
        "model": "gemma", "input": [USER], "instructions": "s", "max_output_tokens": 3, "temperature": 1.0, "tools": [{"type": "function",
            "name": "f"}],
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "stream": False, "top_logprobs": 1, "include": [],
    },
    "/v1/messages": {
        "model": "gemma", "messages": [USER], "max_tokens": 2000, "system": "s", "temperature": 1.0, "top_k": 3, "top_p": 0.9,
            "stop_sequences": ["x"],
        "stream": False, "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"model": "gemma", "messages": [USER]},
    "/tokenize": {"model": "gemma", "prompt": "x", "add_special_tokens": True},
    "/detokenize": {"model": "gemma", "tokens": [5]},
}  # fmt: skip
JUNK: list[Any] = ["text", 7, -7, 1.5, True, [], {}, [[]], [{}], {"a": 1}, "", 1 << 70, -1e300, ["\ud800"], "\ud800", [None], {"type": "x"}]
WRONG: list[tuple[str, str, Any]] = [  # (address, field, a value that is refused)
    *(("/v1/chat/completions", name, value) for name, values in {
        "model": ["gpt-4", 3, []],
        "messages": [
            None, [], {}, "x", [None], [[]], [{}], [{"role": "user"}], [{"role": "wizard", "content": "x"}], [{"role": "user",
                "content": 3}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], [USER, {"role": "tool", "content": "x"}],
            [USER, CALLED], [USER, CALLED, {"role": "tool", "tool_call_id": "b", "content": "x"}], [{"role": "user", "content": "\ud800"}],
            [USER] * 10_001, [{"role": "user", "content": "word " * 10_000}], [{"role": ["user"], "content": "x"}],
            [USER, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": 3}}]}],
        ],
        "temperature": [-1, 2.1, "1", True, [], 1e400], "top_p": [-0.1, 1.1, "x"], "top_k": [-2, 1.5, "x", 1 << 40], "n": [0, -1, 129,
            "1", 1.5],
        "max_tokens": [0, -1, "x", 1.5, 1 << 40], "max_completion_tokens": [0, "x"], "seed": ["x", 1.5, 1 << 64], "stop": [3, [3],
            ["x"] * 17, {}],
        "stream": ["true", 1], "stream_options": [3, {"include_usage": "yes"}], "logit_bias": [3, {"x": 1}, {"5": 101}, {"5": "x"},
            {"-1": 1}, {"300000": 1}, {"000000000000300000": 1}, {"0" * 5000: 1}, {"\u0663": 1}],
        "use_beam_search": [True], "include_stop_str_in_output": [True], "skip_special_tokens": [False], "bad_words": [["x"]],
        "grammar": ["root ::= x"], "json_schema": [{"type": "object"}], "prompt_logprobs": [1], "allowed_token_ids": [[5]],
        "logprobs": [3, "x"], "top_logprobs": [21, -1, "x"], "presence_penalty": [2.1, "x"], "frequency_penalty": [-2.1, []],
            "min_p": [1.1, "x"],
        "repetition_penalty": [0, -1, 11, "x"], "stop_token_ids": [["x"], [-1], [1 << 40], 3], "min_tokens": [-1, "x"], "ignore_eos": ["x"],
        "tools": [3, [3], [{}], [{"type": "retrieval"}], [TOOL, TOOL], [{"type": "function", "function": {"name": "a b"}}], [TOOL] * 257],
        "tool_choice": ["maybe", 3, {"type": "function"}, {"type": "function", "function": {"name": "g"}}, {"type": "x"},
            {"type": "allowed_tools"}],
        "response_format": ["json", {}, {"type": "yaml"}, {"type": 3}, 3], "reasoning_effort": ["extreme", 3], "parallel_tool_calls": ["x"],
        "chat_template_kwargs": [3, {"messages": []}, {"enable_thinking": "no"}, {"tools": []}], "chat_template": ["x"],
            "functions": [[TOOL]],
        "guided_json": [{}], "audio": [{}], "modalities": [["audio"]], "add_generation_prompt": [False], "continue_final_message": [True,
            "x"],
        "thinking_token_budget": [-1, "x"], "cache_salt": [3], "return_token_ids": ["x"], "prediction": [{}], "web_search_options": [{}],
    }.items() for value in values),
    *(("/v1/completions", name, value) for name, values in {
        "prompt": [None, 3, {}, [], [3.5], ["x", 3], [[1 << 40]], [-1], ["x"] * 65, [["x"]], "word " * 10_000, [True]],
        "suffix": ["x"], "best_of": [2, 0], "logprobs": [21, True], "echo": ["x"], "max_tokens": [0, -1],
            "response_format": [{"type": "json_object"}],
    }.items() for value in values),
    *(("/v1/responses", name, value) for name, values in {
        "input": [None, 3, [], [3], [{"type": "item_reference", "id": "x"}], [{"type": "function_call_output", "call_id": "x",
            "output": "y"}],
                  [{"role": "user", "content": [{"type": "input_image"}]}], [{"type": "function_call"}], {},
                  [{"type": "reasoning", "content": 5}, USER], [{"type": "reasoning", "content": [{"text": 5}]}, USER],
                  [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}],
                  [{"type": "function_call_output", "call_id": 5, "output": "y"}], "word " * 10_000],
        "previous_response_id": ["x"], "background": [True], "conversation": ["x"], "truncation": ["auto"],
            "tools": [[{"type": "web_search"}], [{}]],
        "reasoning": [3, {"effort": "x"}], "text": [3, {"format": {"type": "x"}}], "max_output_tokens": [0], "instructions": [3],
            "include": [3],
    }.items() for value in values),
    *(("/v1/messages", name, value) for name, values in {
        "max_tokens": [None, 0, "x"], "messages": [None, [], 3, [3], [{"role": "tool", "content": "x"}], [{"role": "user",
            "content": [{"type": "image"}]}],
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}], [{"role": "user"}], [{"role": "user",
                "content": [3]}],
            [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}],
            [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": [1]}]}],
            [USER, {"role": "assistant", "content": [{"type": "thinking"}]}]],
        "system": [3, [3], [{"type": "image"}]], "temperature": [1.1, "x"], "stop_sequences": [3, [3]],
            "tools": [[{"type": "bash_20250124"}], [3], [{}]],
        "tool_choice": [3, {"type": "x"}, {"type": "any"}, {"type": "tool", "name": "g"}, {}],
        "output_format": [3, {"type": "json_schema"}, {"type": "json_schema", "schema": {"not": {}}}],
        "thinking": [3, {}, {"type": "enabled"}, {"type": "enabled", "budget_tokens": 3}, {"type": "enabled", "budget_tokens": 5000},
            {"type": "x"}],
        "mcp_servers": [[{}]], "container": ["x"], "output_config": [3, {"format": {"type": "json_schema"}}],
        "context_management": [{"edits": [{"type": "clear_tool_uses_20250919"}]}],
    }.items() for value in values),
    *(("/tokenize", name, value) for name, values in {"prompt": [None, 3], "messages": [3, []],
        "content": [3]}.items() for value in values),
    *(("/detokenize", "tokens", value) for value in (None, 3, ["x"], [-1], [1 << 40], [1.5])),
]  # fmt: skip


def shape_is_right(path: str, response: httpx.Response) -> None:
    body = response.json()
    assert 400 <= response.status_code < 500, (path, response.status_code, body)
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and body["error"]["type"] and body["error"]["message"]
    else:
        assert body["error"].keys() == {"message", "type", "param", "code"} and body["error"]["message"]
        assert body["error"]["type"] in ("invalid_request_error", "permission_error", "rate_limit_error")


@pytest.fixture(scope="module")
def http(script: Script):
    script.engine.room = 0  # nothing that is right by mistake is answered: it would be a 429
    with httpx.Client(base_url=script.url, headers=HEADERS, timeout=WAIT) as client:
        yield client
    script.engine.room = 1000


def body(value: Any) -> bytes:
    return json.dumps(value).encode()  # half characters as escapes


@pytest.mark.parametrize("path", sorted({path for path, _, _ in WRONG}))
def test_each_wrong_field(http: httpx.Client, path: str) -> None:
    for at, field, value in WRONG:
        if at == path:
            whole = WHOLE[path] | {field: value}
            if field in ("messages", "tool_choice") and path == "/v1/chat/completions":
                whole.pop("tools")
            if field in ("messages", "content") and path == "/tokenize":
                whole.pop("prompt")
            if field in ("output_format", "tool_choice") and isinstance(value, dict) and value.get("type") in ("any", "json_schema"):
                whole.pop("tools")
                whole.pop("tool_choice", None) if field == "output_format" else None
            response = http.post(path, content=body(whole))
            shape_is_right(path, response)
            assert response.status_code in (400, 404), (field, value, response.text)
            error = response.json()["error"]
            if "param" in error and error["param"] is not None and field not in ("best_of", "max_tokens", "echo", "continue_final_message"):
                assert error["param"].split(".")[0].split("[")[0] == field or error["code"] == "context_length_exceeded", (
                    field,
                    value,
                    error,
                )


def test_what_is_right_is_taken(http: httpx.Client) -> None:
    """The bodies that the others are made of reach the engine, which is full, or are answered."""
    for path, whole in WHOLE.items():
        assert http.post(path, content=body(whole)).status_code in (200, 429), path


def test_a_thousand_by_chance(http: httpx.Client) -> None:
    """Fields that have another type or value, one to three at once: never a 500, and the right body wherever it is refused."""
    random, refused = Random(11), 0
    for _ in range(1000):
        path = random.choice(list(WHOLE))
        whole = json.loads(json.dumps(WHOLE[path]))
        for _ in range(random.randrange(1, 4)):
            spot: Any = whole
            while True:  # somewhere in the body
                key = random.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
                if isinstance(spot[key], dict | list) and spot[key] and random.random() < 0.6:
                    spot = spot[key]
                else:
                    break
            spot[key] = json.loads(json.dumps(random.choice(JUNK)))
        response = http.post(path, content=body(whole))
        if response.status_code != 200:
            shape_is_right(path, response)
            refused += response.status_code != 429
    assert refused > 800


def test_bodies_that_are_none(http: httpx.Client, script: Script) -> None:
    texts = [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b"{'a': 1}", b'{"a": ' * 50_000,
        b"[" * 100_000,
             b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"n": ' + b"9" * 5000 + b"}", b'{"metadata": {"a": -1e999}}']  # fmt: skip
    for path in WHOLE:
        for text in texts:
            response = http.post(path, content=text)
            shape_is_right(path, response)
            assert response.status_code == 400
        assert http.post(path, content=b"x" * (script.served.settings.body + 1)).status_code == 413
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            response = http.post(path, content=b"{}", headers={"content-type": kind})
            shape_is_right(path, response)
            assert response.status_code == 415
        response = http.post(path, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
        shape_is_right(path, response)
        assert response.status_code == 415 and "gzip" in response.text
        response = http.get(path)
        shape_is_right(path, response)
        assert response.status_code == 405 and response.headers["allow"] == "POST"


def all_that_comes(script: Script, path: str, rest: str) -> bytes:
    """Until the server ends the connection. rest: what follows the usual header lines, and no more of it."""
    host, port = script.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n"
        client.sendall((head + rest).encode())
        said = client.recv(1 << 16)
        while piece := client.recv(1 << 16):
            said += piece
    return said


def test_a_body_too_large_is_refused_unread(script: Script) -> None:
    """By the length that its header says: a client that asks first sends none of it."""
    said = all_that_comes(script, "/v1/messages", f"Expect: 100-continue\r\nContent-Length: {1 << 40}\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413 ") and b'"type":"request_too_large"' in said


def test_more_lists_than_can_be_read_between_two_answers(script: Script) -> None:
    body = b'{"model": "small", "prompt": [' + b",".join([b"[]"] * (Settings().brackets + 1)) + b"]}"
    response = httpx.post(f"{script.url}/v1/completions", content=body, headers=HEADERS, timeout=WAIT)
    assert response.status_code == 413 and f"more than {Settings().brackets} opening brackets" in response.json()["error"]["message"]


def test_a_body_that_stops_coming(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SLOWEST", 0.1)
    said = all_that_comes(script, "/v1/chat/completions", 'Content-Length: 100\r\n\r\n{"a": ')
    assert said.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in said


def test_which_entry_is_wrong(http: httpx.Client) -> None:
    """By the client's own numbers, whatever became of its entries; a field that is null is as one that is not there."""
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    items = [{"type": None, **USER}, {**call, "call_id": "a"}, {**call, "call_id": "b"}]
    for some, more, part in [
        ([*items, {"type": "function_call_output", "call_id": "c", "output": "x"}], {}, "input[3].tool_call_id"),
        ([*items, {"role": "wizard", "content": "x"}], {"instructions": "s"}, "input[3].role"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], {}, "input[0].content[0]"),
        (items, {}, "input"),
    ]:
        response = http.post("/v1/responses", content=body({"input": some, **more}))
        assert response.status_code == 400 and response.json()["error"]["param"] == part, response.text
        assert response.json()["error"]["message"].startswith(f"{part}: ")
    used = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    for content, part in [
        ([{**used, "id": None}], "messages[1].content[0].id: is missing"),
        ([{**used, "name": ""}], "messages[1].content[0].name: is empty"),
        ([used], "messages: the call 'a' has no result yet"),
    ]:
        whole = {"max_tokens": 3, "system": "s", "messages": [USER, {"role": "assistant", "content": content}]}
        assert part in http.post("/v1/messages", content=body(whole)).json()["error"]["message"]
    for path, field in (("/v1/responses", "input"), ("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        text = "word " * 10_000
        response = http.post(path, content=body({field: [USER | {"content": text}] if field == "messages" else text}))
        assert response.json()["error"]["param"] == field and response.json()["error"]["code"] == "context_length_exceeded"
    for at, field in (("/v1/chat/completions", "response_format"), ("/v1/responses", "text"), ("/v1/messages", "output_config")):
        form: Any = {"type": "json_schema", "schema": {"type": "object", "not": {}}}
        given = {"input" if "resp" in at else "messages": [USER], "max_tokens": 3}
        error = http.post(at, content=body(given | {field: form if "chat" in at else {"format": form}})).json()["error"]
        assert error["message"].startswith(field if "chat" in at else f"{field}.format"), error


def test_addresses_and_keys(http: httpx.Client, script: Script) -> None:
    for path in ("/v1/embeddings", "/v1/images/generations", "/nothing", "/v1", "/../etc/passwd", "/page/../app.py", "/v1/models/none"):
        for method in ("GET", "POST", "DELETE"):
            response = http.request(method, path)
            right = 405 if path == "/v1/models/none" and method != "GET" else 404
            assert response.status_code == right and response.json()["error"]["message"], (method, path)
    for path in ("/v1/models", "/health", "/metrics", "/models/gemma"):
        assert http.get(path + "/").status_code == http.head(path).status_code == 200
        for method in ("POST", "OPTIONS"):
            response = http.request(method, path)
            assert response.status_code == 405 and response.headers["allow"] == "GET, HEAD"
    assert http.post("/v1/chat/completions/", content=b"{}").json()["error"]["param"] == "messages"
    named = {"anthropic-version": "2023-06-01"}  # the client of the other interface, wherever it asks
    listed = http.get("/v1/models", headers=named).json()
    assert [m["type"] for m in listed["data"]] == ["model"] and listed["first_id"] == "gemma" and not listed["has_more"]
    assert http.get("/v1/models/none", headers=named).json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/nothing", headers=named).json()["type"] == "error"
    for path in ("/v1/models", "/metrics", "/version", "/v1/chat/completions"):
        for headers in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Basic x"},
            {"x-api-key": "x"},
            {"authorization": b"Bearer \xe9"},
        ):
            assert httpx.get(script.url + path, headers=headers, timeout=WAIT).status_code == 401
        assert httpx.get(script.url + path, headers={"x-api-key": KEY}, timeout=WAIT).status_code in (200, 405)
    for path in ("health", "health/live"):
        assert httpx.get(f"{script.url}/{path}", timeout=WAIT).json() == {"status": "ok"}
    assert "Kiln" in httpx.get(script.url, timeout=WAIT).text or "<html" in httpx.get(script.url, timeout=WAIT).text
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": "https://x.example"}).headers


def test_hosts(real: Running) -> None:
    """Bound to loopback, another name in the Host header is refused: a page of that name would be asking."""
    for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("x.example", 403), ("", 403), ("localhost.x.example", 403)):
        assert httpx.get(f"{real.url}/v1/models", headers={"host": host}, timeout=WAIT).status_code == status, host


def test_metrics(script: Script, real: Running) -> None:
    httpx.post(f"{real.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=WAIT)
    httpx.get(f"{script.url}/v1/models", timeout=WAIT)
    text = httpx.get(f"{real.url}/metrics", timeout=WAIT).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total",
                 "request_success_total", "time_to_first_token_seconds_bucket", "prefix_cache_hits_total"):  # fmt: skip
        assert f"\nkiln:{name}{{" in text, name
    text = httpx.get(f"{script.url}/metrics", headers=HEADERS, timeout=WAIT).text
    assert 'kiln:request_refused_total{model_name="gemma",status="401"}' in text


def test_the_page(tmp_path: Path, script: Script) -> None:
    """Files of the folder and nothing else; without a key, for a browser cannot send one with an address."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<html>page</html>")
    (tmp_path / "assets" / "page.js").write_text("let x")
    (tmp_path.parent / "secret.txt").write_text("secret")
    assert page_files(tmp_path).keys() == {"/", "/index.html", "/assets/page.js"} and page_files(tmp_path / "none") == {}
    client = TestClient(application(script.served, tmp_path))
    assert client.get("/").text == "<html>page</html>" and client.get("/assets/page.js").headers["content-type"].startswith(
        "text/javascript"
    )
    assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")
    assert client.get("/../secret.txt").status_code in (401, 404) and client.get("/v1/models").status_code == 401


def test_other_origins(script: Script) -> None:
    """Those that were named get their headers, on a refusal too; others none."""
    served = copy.copy(script.served)
    served.settings = dataclasses.replace(served.settings, origins=("https://a.example",))
    client = TestClient(application(served))
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        assert (
            client.options("/v1/chat/completions", headers={"origin": origin, **asks}).headers.get("access-control-allow-origin") == allowed
        )
        answer = client.get("/v1/models", headers={"origin": origin})
        assert answer.status_code == 401 and answer.headers.get("access-control-allow-origin") == allowed


def test_no_prompt_is_logged(script: Script, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a line for each request, not where a request is refused, not where the server itself fails."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(script.engine, "room", 1000)
    served = copy.copy(script.served)
    served.settings = dataclasses.replace(served.settings, log=True)
    client = TestClient(application(served), raise_server_exceptions=False)
    good = {"model": "gemma", "messages": [{"role": "user", "content": "my secret"}]}
    script.will_say("an answer that is secret, too", 106)
    assert client.post("/v1/chat/completions", json=good, headers=HEADERS).status_code == 200
    assert client.post("/v1/chat/completions", json=good | {"temperature": "my secret"}, headers=HEADERS).status_code == 400
    monkeypatch.setattr(served, "converse", lambda *given: 1 / 0)
    before = served.metrics.text().count(b'status="500"')
    failed = client.post("/v1/chat/completions", json=good, headers=HEADERS)
    assert failed.status_code == 500 and failed.json()["error"]["message"] == "internal error"
    assert not before and b'status="500"' in served.metrics.text()
    client.get("/a%0aINFO%20b%1b[2J", headers=HEADERS)
    assert all(record.getMessage().isprintable() for record in caplog.records if record.name == "kiln.serve")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "POST /v1/chat/completions 200" in said and "a request failed" in said
    assert "secret" not in said and KEY not in said
