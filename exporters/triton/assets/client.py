"""Smoke test of a served repository. It needs Python 3.10 or newer, and nothing else.

    python client.py --url http://localhost:8000 --metrics http://localhost:8002

Exit status: 0 all checks passed, 1 one failed or the server is not there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

PROMPTS = [
    "Why is the sky blue?",
    "Name three fruits.",
    "Write a short poem about the sea.",
    "What is the capital of France, and how large is it?",
    "Explain in one sentence what a compiler does.",
    "2, 4, 8, 16,",
    "Translate to German: good morning.",
    "Once upon a time there was a fox who",
]


class Server:
    """A server's HTTP endpoints."""

    def __init__(self, url: str, metrics: str, timeout: float) -> None:
        self.url, self.metrics_url, self.timeout = url.rstrip("/"), metrics.rstrip("/"), timeout

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=self.timeout) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.status, bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, bytes(error.read())

    def generate(self, model: str = "generate", **values: Any) -> dict[str, Any]:
        status, body = self.post(f"/v2/models/{model}/generate", values)
        if status != 200:
            raise AssertionError(f"status {status}: {body.decode(errors='replace')[:300]}")
        return dict(json.loads(body))

    def stream(self, **values: Any) -> list[dict[str, Any]]:
        status, body = self.post("/v2/models/generate/generate_stream", {**values, "stream": True})
        if status != 200:
            raise AssertionError(f"status {status}: {body.decode(errors='replace')[:300]}")
        return [
            json.loads(line[len("data:") :])
            for line in body.decode().splitlines()
            if line.startswith("data:")
        ]

    def statistics(self) -> dict[str, Any]:
        found = json.loads(self.generate(server_statistics=True)["statistics"])
        return dict(found["model_stats"][0])

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.metrics_url + "/metrics", timeout=self.timeout) as answer:
            text = answer.read().decode()
        values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
        if not values:
            raise AssertionError(f"no metric {name}")
        return sum(map(float, values))


def expect(fact: bool, words: str) -> None:
    """Raise unless ``fact``."""
    if not fact:
        raise AssertionError(words)


def answers(server: Server) -> str:
    """An answer has text, token counts and statistics."""
    made = server.generate(text_input=PROMPTS[0], chat=True, max_tokens=8)
    statistics = json.loads(made["statistics"])
    expect(made["num_output_tokens"] == statistics["tokens"] > 0, f"no tokens: {made}")
    expect(len(statistics["decisions"]) == len(statistics["layers"]), "a decision a routed layer")
    return f"{statistics['tokens']} tokens, capacity {statistics['capacity']:.2f}"


def streams(server: Server) -> str:
    """A stream says the same as an answer."""
    whole = server.generate(text_input=PROMPTS[1], chat=True, max_tokens=12)["text_output"]
    pieces = server.stream(text_input=PROMPTS[1], chat=True, max_tokens=12)
    text = "".join(piece["text_output"] for piece in pieces)
    expect(text == whole, f"stream {text!r}, answer {whole!r}")
    expect(pieces[-1]["finish_reason"] in ("end", "length"), f"it ended with {pieces[-1]}")
    return f"{len(pieces)} pieces"


def alone_or_together(server: Server) -> str:
    """Requests beside one another get what they get alone."""
    alone = [server.generate(text_input=each, chat=True, max_tokens=12) for each in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures = [
            pool.submit(server.generate, text_input=each, chat=True, max_tokens=12)
            for each in PROMPTS
        ]
        together = [future.result() for future in futures]
    for one, other in zip(alone, together, strict=True):
        expect(one["output_ids"] == other["output_ids"], "other tokens beside others than alone")
        routed = [json.loads(each["statistics"])["decisions"] for each in (one, other)]
        expect(routed[0] == routed[1], "other decisions beside others than alone")
    return f"{len(PROMPTS)} requests"


def turns_the_dial(server: Server) -> str:
    """Capacity 1 executes everything, 0 nothing."""
    shares = []
    for capacity in (0.0, 1.0):
        made = server.generate(text_input=PROMPTS[2], max_tokens=1, capacity=capacity)
        shares.append(json.loads(made["statistics"])["capacity"])
    routed = json.loads(made["statistics"])["layers"]
    expect(not routed or shares == [0.0, 1.0], f"capacities 0 and 1 executed {shares}")
    return f"executed shares {shares[0]:g} and {shares[1]:g}"


def draws(server: Server) -> str:
    """The same seed draws the same tokens."""
    asked: dict[str, Any] = {
        "text_input": PROMPTS[3],
        "chat": True,
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 7,
    }
    one, two = server.generate(**asked), server.generate(**asked)
    expect(one["output_ids"] == two["output_ids"], "seed 7 drew two answers")
    return "seed 7 twice"


def ensemble(server: Server) -> str:
    """Text in, text out."""
    made = server.generate("ensemble", text_input=PROMPTS[5], max_tokens=8)
    same = server.generate(text_input=PROMPTS[5], max_tokens=8)
    expect(made["text_output"] == same["text_output"], "another text than generate's")
    return repr(made["text_output"][:30])


def refuses(server: Server) -> str:
    """What cannot be served is refused with the reason."""
    asked = [
        ({"text_input": "x", "max_tokens": -1}, "max_tokens"),
        ({"text_input": "x", "tau": 1.5}, "tau"),
        ({"text_input": "x", "capacity": 2.0}, "capacity"),
        ({"text_input": "", "max_tokens": 1}, "empty"),
        ({"text_input": "word " * 200_000, "max_tokens": 1}, "positions"),
    ]
    for values, word in asked:
        status, body = server.post("/v2/models/generate/generate", values)
        expect(status >= 400 and word in body.decode(), f"{word}: status {status}, {body[:200]!r}")
    return f"{len(asked)} bad requests"


def meters(server: Server) -> str:
    """Metrics count, and nothing is held when nothing runs."""
    before = server.metric("mskip_tokens_total")
    server.generate(text_input=PROMPTS[4], chat=True, max_tokens=4)
    expect(server.metric("mskip_tokens_total") > before, "tokens were not counted")
    held = server.metric("mskip_kv_bytes{")
    expect(held == 0, f"{held} bytes of keys and values are held though nothing runs")
    return f"{server.metric('mskip_tokens_total'):.0f} tokens so far"


def reports(server: Server) -> str:
    """Statistics as JSON: a request is counted once, with a decision for each routed layer."""
    before = server.statistics()
    made = json.loads(server.generate(text_input=PROMPTS[6], max_tokens=4)["statistics"])
    after = server.statistics()
    if after["instance"] != before["instance"]:
        return "several instances, each with its own"
    prompts = after["queue"]["count"] - before["queue"]["count"]
    # The server may have others to serve.
    expect(prompts >= 1, f"{prompts} prompts were counted")
    expect(sorted(after["layers"], key=int) == list(map(str, made["layers"])), "other layers")
    for name, layer in after["layers"].items():
        decided = layer["executed"] + layer["skipped"]
        # One prompt may be in the middle of being counted.
        missing = after["queue"]["count"] - decided
        expect(0 <= missing <= 1, f"layer {name} has {decided} decisions")
    return f"capacity {after['capacity']:.2f} over {after['queue']['count']} prompts"


CHECKS = [
    *(
        answers,
        streams,
        alone_or_together,
        turns_the_dial,
        draws,
        ensemble,
        refuses,
        meters,
        reports,
    ),
]


def run(server: Server) -> bool:
    """Run all checks; whether they passed."""
    passed = True
    for check in CHECKS:
        start = time.monotonic()
        try:
            words, mark = check(server), "ok"
        except Exception as error:
            words, mark, passed = f"{type(error).__name__}: {error}", "FAILED", False
        seconds = time.monotonic() - start
        print(f"{mark:<7}{check.__name__:<20}{seconds:6.1f} s  {words}", flush=True)
    return passed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Smoke test of a served repository.")
    parser.add_argument("--url", default="http://localhost:8000", help="HTTP endpoint")
    parser.add_argument("--metrics", default="http://localhost:8002", help="metrics endpoint")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for an answer")
    parser.add_argument("--write-prompts", help="write input data for perf_analyzer, and stop")
    options = parser.parse_args()
    if options.write_prompts:
        rows = [
            {"text_input": [each], "chat": [True], "max_tokens": [32], "stream": [True]}
            for each in PROMPTS
        ]
        with open(options.write_prompts, "w", encoding="utf-8") as stream:
            json.dump({"data": rows}, stream)
        return 0
    server = Server(options.url, options.metrics, options.timeout)
    try:
        server.get("/v2/health/ready")
    except OSError as error:
        print(f"no server is ready at {options.url}: {error}", file=sys.stderr)
        return 1
    return 0 if run(server) else 1


if __name__ == "__main__":
    sys.exit(main())
