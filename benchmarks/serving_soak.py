"""Minutes of mixed load: requests of every kind, each held against what is right."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from serving_client import measured, prompts, request, server_of

from mskip.compressor.artifact import Run
from mskip.exporters.onnx_export import MODEL
from mskip.exporters.opening import open_runner
from mskip.exporters.serving.texts import Texts
from mskip.exporters.triton.repository import MODELS
from mskip.exporters.triton.server import Ports, Server, install_server

BAD: list[dict[str, Any]] = [
    {"text_input": "x", "max_tokens": -1},
    {"text_input": "x", "tau": 2.0},
    {"text_input": "", "max_tokens": 4},
    {"text_input": "word " * 20_000, "max_tokens": 4},
    {"text_input": "x", "max_tokens": "many"},
]


def soak(run: Run, minutes: float, threads: int, place: Path) -> dict[str, Any]:
    """Requests of all kinds for some minutes, each held against what is right."""
    rng = random.Random(0)
    asked = []
    for text in prompts()[:24]:
        for capacity in (None, 0.25, 1.0):
            asked.append((text, capacity, rng.randint(4, 40)))
    with server_of(run, install_server(), MODEL, place, threads, 1024) as server:
        folder = place / "repository" / MODELS
        texts, dial = Texts(folder / "tokenizer/1"), _dial(folder)
        runner = open_runner(run.path / "ort", threads=threads)
        print(f"reference: {len(asked)} requests", flush=True)
        expected = [
            runner.generate(
                [texts.ids(text, chat=True)],
                tokens,
                tau=None if capacity is None else dial.tau(capacity),
            ).tokens[0]
            for text, capacity, tokens in asked
        ]
        drawn = {
            number: request(server.ports, **_drawn(asked[number][0], number))["ids"]
            for number in range(0, len(asked), 6)
        }
        del runner
        before = _resident(server)
        counts: Counter[str] = Counter()
        lock = threading.Lock()
        end = time.monotonic() + 60 * minutes
        faults: list[str] = []

        def worker(seed: int) -> None:
            mine = random.Random(seed)
            while time.monotonic() < end:
                kind, fault, tokens = _one(server.ports, mine, asked, expected, drawn)
                with lock:
                    counts[kind] += 1
                    counts["tokens"] += tokens
                    if fault:
                        counts[f"wrong: {kind}"] += 1
                        faults.append(fault)

        threads_ = [threading.Thread(target=worker, args=(seed,)) for seed in range(20)]
        memory = []
        for each in threads_:
            each.start()
        while any(each.is_alive() for each in threads_):
            time.sleep(5)
            memory.append(_resident(server))
            left = max(0.0, end - time.monotonic())
            print(f"{left:.0f} s left, {dict(counts)}, {memory[-1] / 1e6:.0f} MB", flush=True)
        time.sleep(2)
        found = measured(server.ports)
        held = {
            "kv_bytes": found["kv_bytes"]["held"],
            **{name: found[name] for name in ("active_sequences", "queued_requests")},
        }
        ends = ("end", "length", "stop", "cancelled", "refused", "error")
        outcomes = {name: found["requests"].get(name, 0) for name in ends}
        alive = server.process.poll() is None
        after = _resident(server)
    return {
        "minutes": minutes,
        "clients": 20,
        "counts": dict(counts),
        "wrong": len(faults),
        "faults": faults[:10],
        "held_at_the_end": held,
        "outcomes": outcomes,
        "resident_bytes": {
            "before": before,
            "after": after,
            "first_half_max": max(memory[: len(memory) // 2], default=before),
            "second_half_max": max(memory[len(memory) // 2 :], default=before),
        },
        "crashed": not alive,
    }


def _dial(folder: Path) -> Any:
    from mskip.exporters.serving.dial import read_dial

    return read_dial(folder / "generate/1/dial.json")


def _drawn(text: str, seed: int) -> dict[str, Any]:
    """A request whose tokens are drawn."""
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 100, "seed": seed}
    return {"text_input": text, "chat": True, "max_tokens": 24, **options}


def _one(
    ports: Ports, rng: random.Random, asked: Any, expected: Any, drawn: dict[int, list[int]]
) -> tuple[str, str, int]:
    """One request of any kind; its kind, what was wrong with it, and its tokens."""
    draw = rng.random()
    if draw < 0.05:
        made = request(ports, **rng.choice(BAD))
        return "bad", "" if made["error"] else "a bad request was served", 0
    if draw < 0.15:
        number = rng.choice(list(drawn))
        ids = request(ports, **_drawn(asked[number][0], number))["ids"]
        return "drawn", "" if ids == drawn[number] else f"drawn {number}: {ids}", len(ids)
    number = rng.randrange(len(asked))
    text, capacity, tokens = asked[number]
    values = {"text_input": text, "chat": True, "max_tokens": tokens}
    if capacity is not None:
        values["capacity"] = capacity
    if draw < 0.27:
        made = request(ports, **values, cancel_after=rng.randint(1, 4))
        right = made["ids"] == expected[number][: len(made["ids"])]
        return "cancelled", "" if right else f"cancelled {number}: {made}", len(made["ids"])
    made = request(ports, **values)
    right = made["ids"] == expected[number] and not made["error"]
    return "whole", "" if right else f"{number}: {made['ids']} {made['error']}", len(made["ids"])


def _resident(server: Server) -> int:
    """Resident bytes of the process that runs "generate": the largest of the server's."""
    sizes = [0]
    for path in Path("/proc").iterdir():
        try:
            if os.getsid(int(path.name)) != server.process.pid:
                continue
            pages = int((path / "statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError):
            continue
    return max(sizes)
