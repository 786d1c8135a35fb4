"""Two replicas on the CPU under Ray Serve: the same answers as one server, streams whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import kiln
from tests.serve import solo

pytestmark = pytest.mark.nightly
PORT = 18473


@pytest.fixture(scope="module")
def url(talking: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="pip install 'kiln-export[ray]'")
    from ray import serve
    from ray.serve.config import HTTPOptions

    from kiln.exporter.serve.deploy.ray_serve import Plan, application

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
        serve.run(application(talking, Plan(2, 2, gpus=0.0, cpus=0.5), "cpu", 1, names=("small",), chunk=16))
        yield f"http://127.0.0.1:{PORT}"
        serve.shutdown()
    finally:
        ray.shutdown()


def test_answers_of_two_replicas(url: str, talking: Path) -> None:
    model = kiln.Model(str(talking), "cpu")
    for i in range(4):
        ids, free = [2, *range(20 + i, 40 + i)], {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": i, "return_token_ids": True}
        body = {"prompt": ids, "max_tokens": 8, **free}
        whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert whole.status_code == 200, whole.text
        tokens = whole.json()["choices"][0]["token_ids"]
        assert tokens == solo.write(model, ids, 8, 16, (1.0, 0, 1.0, i))
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        assert sum((event["choices"][0]["token_ids"] for event in events), []) == tokens


def test_what_is_wrong(url: str) -> None:
    assert httpx.post(f"{url}/v1/completions", json={"prompt": 3}, timeout=60).status_code == 400
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/nowhere", timeout=60).status_code == 404
