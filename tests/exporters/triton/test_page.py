"""The page of `mskip serve`, before a real server."""

from __future__ import annotations

import json
import socketserver
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import browser
import pytest
from served import PROMPTS, WAIT, Served


def test_the_page_shows_what_was_skipped(served: Served, tmp_path: Path) -> None:
    """In a browser: the slider, the stream, a bar a layer, and a refusal."""
    from mskip.exporters.triton.page import page_served

    with (
        page_served(served.server.ports, 0) as address,
        browser.opened(address, tmp_path / "profile") as page,
    ):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        def at(name: str) -> Any:
            return page.find_element(By.ID, name)

        def run(capacity: float, text: str, state: str) -> None:
            page.execute_script(
                "const s = document.getElementById('capacity');"
                "s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
                "document.body.dataset.state = '';",
                capacity,
            )
            at("prompt").clear()
            at("prompt").send_keys(text)
            at("go").click()
            body = page.find_element(By.TAG_NAME, "body")
            WebDriverWait(page, WAIT).until(lambda _: body.get_attribute("data-state") == state)

        for capacity, skipped in ((0.0, 3), (1.0, 0)):
            run(capacity, PROMPTS[0], "done")
            made = served.generate(
                text_input=PROMPTS[0], chat=True, max_tokens=64, capacity=capacity
            )
            assert at("text").get_attribute("textContent") == made["text_output"]
            assert len(page.find_elements(By.CSS_SELECTOR, "#layers tr.skip")) == skipped
            assert len(page.find_elements(By.CSS_SELECTOR, "#layers tr")) == 3
            assert f"{capacity:.2f}" == at("shown").text
        run(0.5, "one " * 400, "failed")
        assert "positions" in at("error").text


def test_the_page_passes_on_nothing_else(served: Served) -> None:
    """A browser cannot unload models through it."""
    from mskip.exporters.triton.page import page_served

    served.generate(text_input=PROMPTS[0], max_tokens=1)  # there is no count of nothing
    with page_served(served.server.ports, 0) as address:
        for path in ("v2/repository/models/generate/unload", "elsewhere"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}{path}", b"{}")
        with urllib.request.urlopen(f"{address}metrics") as answer:
            assert b"mskip_tokens_total" in answer.read()
        with urllib.request.urlopen(f"{address}stats") as answer:
            assert json.load(answer)["model_stats"][0]["name"] == "generate"


@pytest.mark.parametrize("accepts", [False, True])
def test_the_page_says_that_no_server_answers(accepts: bool) -> None:
    """Whether nobody listens, or somebody who hangs up."""
    from mskip.exporters.triton.page import page_served
    from mskip.exporters.triton.server import Ports

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1)

    with socketserver.TCPServer(("127.0.0.1", 0), HangsUp) as nobody:
        port = nobody.server_address[1]
        if accepts:
            threading.Thread(target=nobody.serve_forever, daemon=True).start()
        else:
            nobody.server_close()
        with page_served(Ports(port, port, port), 0) as address:
            for path in ("stats", "metrics", "v2/health/live"):
                with pytest.raises(urllib.error.HTTPError, match="502") as refused:
                    urllib.request.urlopen(f"{address}{path}")
                assert refused.value.read() == b"the server does not answer\n"
        if accepts:
            nobody.shutdown()
