"""A server as it is where nothing is said, over rows of a GPU: what is kept of one conversation serves those that begin like it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.measure.measure_serve import serving
from tests.runtime.batches import NANO, batch_artifact

pytestmark = pytest.mark.gpu
WAIT = 60
SYSTEM = "You tell very short stories for small children, of a boy, a girl, a cat and a dog, who play and are friends."


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return batch_artifact("cuda", tmp_path_factory)


def test_what_conversations_share(several) -> None:
    """All rows at once: two of them at least hold nothing of the beginning, and copy it from the row that has read it."""
    with serving(several, NANO, "cuda") as url, httpx.Client(base_url=url, timeout=WAIT) as http:
        name = http.get("/v1/models").json()["data"][0]["id"]

        def ask(text: str) -> tuple[str, int]:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            body: dict[str, Any] = {"model": name, "messages": messages, "max_tokens": 40, "temperature": 0}
            found = http.post("/v1/chat/completions", json=body)
            assert found.status_code == 200, found.text
            answer = found.json()
            return answer["choices"][0]["message"]["content"] or "", answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        texts = ["The dog runs.", "The cat sleeps.", "A girl sings."]  # one for each row
        alone = [ask(text) for text in texts]
        assert [cached > 0 for _, cached in alone] == [False, True, True]
        with ThreadPoolExecutor(len(texts)) as pool:
            together = list(pool.map(ask, texts))
        assert [text for text, _ in together] == [text for text, _ in alone] and all(cached for _, cached in together)
        counts = {key: float(value) for key, value in re.findall(r"snapshot_(\w+){[^}]*} (\S+)", http.get("/metrics").text)}
        assert counts["kept"] and counts["hits"] and not counts["refused"], counts
        assert counts["device_bytes"] and not counts["host_bytes"], counts
