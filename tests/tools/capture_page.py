"""Pictures of the page, with answers by a script: python -m tests.tools.capture_page docs/captures. Look at them before they go in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.serve.fake_server import Answer, FakeServer
from tests.serve.page.conftest import CHROMIUM, PAGE, ask, words

SKY = """Sunlight is scattered by the molecules of the air, and **short wavelengths are scattered more** than long ones, by about *λ⁻⁴*:

| colour | wavelength | scattered |
|---|---:|---:|
| blue | 450 nm | 4.4 |
| green | 550 nm | 2.0 |
| red | 650 nm | 1.0 |

```python
def scattered(nm: float, reference: float = 650.0) -> float:
    # Rayleigh: the inverse fourth power
    return (reference / nm) ** 4
```

From every direction, then, blue arrives. At sunset the way through the air is long:

1. the blue is gone before the light reaches you,
2. what is left is `orange` and red.
"""
SEA = "Only a little. Water takes red light out of what passes through it: deep water is blue **by itself**. A flat sea mirrors the sky."
CALL = {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Lisbon", "days": 2}'}}]}
OTHERS = ["A letter to the landlord", "Rust or C++ for a parser?", "Dinner for six, no nuts"]
VIEWS: dict[str, dict[str, Any]] = {
    "page-light": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "page-dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True, "device_scale_factor": 1.5},
}


def answer(request: dict[str, Any]) -> Answer:
    last = request["messages"][-1]["content"]
    if "weather" in last:
        return Answer([{"reasoning_content": "The tool knows."}, CALL], finish="tool_calls", prompt_tokens=1690, cached=1650)
    thoughts = [{"reasoning_content": word} for word in words("The question is about Rayleigh scattering; a table helps.")]
    text = SEA if "sea" in last else SKY
    return Answer([*thoughts, *words(text)], first=0.12, gap=0.0118, prompt_tokens=1262 + 250 * len(request["messages"]), cached=1210)


def main(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with FakeServer(answer, PAGE, context=131072, name="answers-by-a-script") as server, sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, options in VIEWS.items():
            context = browser.new_context(**options)
            page = context.new_page()
            page.goto(server.url)
            for other in OTHERS:
                ask(page, other)
                page.evaluate("document.getElementById('new').click()")
            page.click("#think")
            ask(page, "Why is the sky blue?")
            if name == "page-light":
                page.locator("summary").click()
                page.evaluate("document.getElementById('log').scrollTop = 0")
            else:
                ask(page, "What will the weather be in Lisbon?" if name == "page-dark" else "Is that why the sea is blue, too?")
            page.mouse.move(5, 5)
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(400)
            page.screenshot(path=folder / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
