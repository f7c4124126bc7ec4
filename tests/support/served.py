"""A running server of a tiny run, and how tests talk to it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.triton.server import Server

WAIT = 60.0
PROMPTS = ["the question is one", "two", "answer the question", "user one two one", "is the answer"]


@dataclass(frozen=True)
class Served:
    """A server of the tiny run.

    Attributes:
        server: it runs.
        folder: its repository.
        runner: the reference.
        texts: the tokenizer as the server has it.
    """

    server: Server
    folder: Path
    runner: OrtRunner
    texts: Any

    def post(self, path: str, value: Any) -> tuple[int, str]:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        request = urllib.request.Request(self.server.ports.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, **values: Any) -> dict[str, Any]:
        status, body = self.post("/v2/models/generate/generate", values)
        assert status == 200, body
        value: dict[str, Any] = json.loads(body)
        ids = value["output_ids"]  # Triton writes one value as no list
        return {**value, "output_ids": ids if isinstance(ids, list) else [ids]}

    def metric(self, start: str) -> float:
        with urllib.request.urlopen(f"{self.server.ports.metrics_url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))

    def statistics(self) -> dict[str, Any]:
        found = json.loads(self.generate(server_statistics=True)["statistics"])
        (model,) = found["model_stats"]
        return dict(model)

    def expected(self, text: str, tokens: int, tau: Any = None) -> Any:
        """Of the runner that parity was proven with."""
        ids = self.texts.ids(text)
        return self.runner.generate([ids], tokens, tau=tau)
