"""A run on a real Triton Inference Server: throughput, latency, and ten minutes of mixed load.

    python benchmarks/serving.py runs/smollm2-135m                 # throughput, routed and dense
    python benchmarks/serving.py runs/smollm2-135m --soak 10       # minutes of mixed load
    python benchmarks/serving.py runs/smollm2-135m --perf-analyzer # NVIDIA's own tool

The run must be exported with ``mskip export --triton``. Routed and dense are two servers, of which
one is idle at a time, and they take turns, so that what the machine does meanwhile meets both.
The greedy reference of the mixed load is `OrtRunner`, one sequence at a time.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.artifact import Run, versions
from mskip.compressor.dial import saved_dial
from mskip.compressor.files import write_json
from mskip.compressor.models import load_tokenizer
from mskip.exporters.onnx_export import DENSE, MODEL
from mskip.exporters.opening import open_runner
from mskip.exporters.serving.texts import Texts
from mskip.exporters.speed import machine
from mskip.exporters.triton.repository import FOLDER, MODELS, Deployment, write_repository
from mskip.exporters.triton.server import (
    Installed,
    Ports,
    Server,
    free_ports,
    install_server,
    requirements,
    started,
)

TOKENS = 32
PERF_ANALYZER = "2.51.0"
"""Of tritonclient, whose wheel carries the tool."""


def prompts() -> list[str]:
    """Requests of different lengths, shipped with the recipes."""
    text = (resources.files("mskip.recipes") / "prompts.jsonl").read_text("utf-8")
    return [str(json.loads(line)["messages"][0]["content"]) for line in text.splitlines() if line]


def request(ports: Ports, *, cancel_after: int | None = None, **values: Any) -> dict[str, Any]:
    """One request as a stream, closed after so many tokens if asked for.

    Returns:
        ``ids``, ``statistics`` of the end, ``times`` of each piece in seconds from the start,
        ``error``.
    """
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", ports.http, timeout=600)
    body = json.dumps({**values, "stream": True})
    connection.request("POST", "/v2/models/generate/generate_stream", body)
    answer = connection.getresponse()
    made: dict[str, Any] = {"ids": [], "times": [], "error": None, "statistics": None}
    while line := answer.readline():
        if line.startswith(b"{"):
            made["error"] = json.loads(line)["error"]
        if not line.startswith(b"data:"):
            continue
        piece = json.loads(line[5:])
        if "error" in piece:
            made["error"] = piece["error"]
            break
        ids = piece["output_ids"]
        made["ids"] += ids if isinstance(ids, list) else [ids]
        made["times"].append(time.monotonic() - start)
        if piece["statistics"]:
            made["statistics"] = json.loads(piece["statistics"])
        if cancel_after is not None and len(made["ids"]) >= cancel_after:
            break
    connection.close()
    return made


def measured(ports: Ports) -> dict[str, Any]:
    """What the served model has measured so far."""
    connection = http.client.HTTPConnection("127.0.0.1", ports.http, timeout=60)
    connection.request("POST", "/v2/models/generate/generate", b'{"server_statistics": true}')
    answer = json.load(connection.getresponse())
    found: dict[str, Any] = json.loads(answer["statistics"])["model_stats"][0]
    return found


@contextmanager
def server_of(
    run: Run, installed: Installed, graph: str, place: Path, threads: int, positions: int
) -> Iterator[Server]:
    """A server of one of the run's graphs."""
    dial = saved_dial(run)
    if dial is None:
        raise SystemExit("export the run first: mskip export --triton")
    deployment = Deployment(threads=threads, positions=positions)
    tokenizer = load_tokenizer(deployment.form.folder(run))
    write_repository(run, tokenizer, dial, deployment, graph=graph, folder=place / "repository")
    models = place / "repository" / MODELS
    with started(installed, models, place / "log.txt", free_ports()) as server:
        yield server


# -- throughput -------------------------------------------------------------------------------


def load(ports: Ports, texts: list[str], clients: int, **options: Any) -> dict[str, float]:
    """``clients`` at a time ask for all texts."""
    start = time.monotonic()

    def ask(text: str) -> dict[str, Any]:
        return request(ports, text_input=text, chat=True, max_tokens=TOKENS, **options)

    with ThreadPoolExecutor(clients) as pool:
        made = list(pool.map(ask, texts))
    seconds = time.monotonic() - start
    faults = [each["error"] for each in made if each["error"]]
    if faults:
        raise SystemExit(f"a request failed: {faults[0]}")
    tokens = sum(len(each["ids"]) for each in made)
    firsts = [each["times"][0] for each in made if each["times"]]
    gaps = [
        (each["times"][-1] - each["times"][0]) / (len(each["ids"]) - 1)
        for each in made
        if len(each["ids"]) > 1
    ]
    return {
        "tokens_per_second": tokens / seconds,
        "first_ms": 1e3 * statistics.median(firsts),
        "first_p95_ms": 1e3 * float(np.quantile(firsts, 0.95)),
        "token_ms": 1e3 * statistics.median(gaps),
        "capacity": statistics.fmean(each["statistics"]["capacity"] for each in made),
    }


def throughput(run: Run, rounds: int, threads: int, place: Path) -> dict[str, Any]:
    """Routed and dense in turns, at 1, 4 and 16 requests at a time."""
    installed = install_server()
    texts = (prompts() * 2)[:32]
    counts = {1: 8, 4: 16, 16: 32}
    graphs = {"routed": MODEL, "dense": DENSE}
    cells: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(server_of(run, installed, graph, place / name, threads, 1024))
            for name, graph in graphs.items()
        }
        for server in servers.values():
            load(server.ports, texts[:4], 4)
        for number in range(rounds):
            for clients, count in counts.items():
                names = list(servers) if number % 2 else list(servers)[::-1]
                for name in names:
                    found = load(servers[name].ports, texts[:count], clients)
                    cell = cells.setdefault(f"{name}, {clients}", {})
                    for key, value in found.items():
                        cell.setdefault(key, []).append(value)
                    print(number, name, clients, f"{found['tokens_per_second']:.1f} tokens/s",
                          flush=True)  # fmt: skip
    pace = {key: cell["tokens_per_second"] for key, cell in cells.items()}
    ratios = {
        **{
            f"{name}: 16 over 1": _ratio(pace[f"{name}, 16"], pace[f"{name}, 1"]) for name in graphs
        },
        **{
            f"routed over dense, {clients}": _ratio(
                pace[f"routed, {clients}"], pace[f"dense, {clients}"]
            )
            for clients in counts
        },
    }
    return {
        "rounds": rounds,
        "threads": threads,
        "tokens": TOKENS,
        "requests": counts,
        "cells": cells,
        "ratios": ratios,
    }


def _ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Median of the rounds' ratios, and half their range."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": statistics.median(ratios), "half_range": (max(ratios) - min(ratios)) / 2}


def show_throughput(report: dict[str, Any]) -> None:
    """The table."""
    print("| graph | at a time | tokens/s | first token, median (p95) | a token | capacity |")
    print("|---|---|---|---|---|---|")
    for key, cell in report["cells"].items():
        name, clients = key.split(", ")
        m = {each: statistics.median(values) for each, values in cell.items()}
        print(
            f"| {name} | {clients} | {m['tokens_per_second']:.1f} | {m['first_ms']:.0f} "
            f"({m['first_p95_ms']:.0f}) ms | {m['token_ms']:.0f} ms | {m['capacity']:.2f} |"
        )
    for key, value in report["ratios"].items():
        print(f"{key}: {value['median']:.2f} +- {value['half_range']:.2f}")


# -- mixed load -------------------------------------------------------------------------------

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


# -- perf_analyzer ----------------------------------------------------------------------------


def perf_analyzer(run: Run, threads: int, place: Path) -> dict[str, Any]:
    """NVIDIA's tool at 1, 4 and 16 requests at a time, over gRPC, streaming."""
    installed = install_server()
    tool, libraries = _tool(installed, place)
    with server_of(run, installed, MODEL, place, threads, 1024) as server:
        client = place / "repository/client.py"
        data = place / "prompts.json"
        subprocess.run([sys.executable, client, "--write-prompts", data], check=True)
        rows = []
        for clients in (1, 4, 16):
            command = [
                *(tool, "-m", "generate", "--streaming", "-i", "grpc"),
                *("-u", f"127.0.0.1:{server.ports.grpc}", "--input-data", data),
                *("--concurrency-range", str(clients), "--measurement-mode", "count_windows"),
                *("--measurement-request-count", str(8 + 2 * clients), "-s", "60", "-r", "3"),
                *("-f", place / f"perf-{clients}.csv"),
            ]
            done = subprocess.run(
                [str(each) for each in command],
                env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))},
                capture_output=True,
                text=True,
                check=False,
            )
            print(done.stdout[-1500:], done.stderr[-500:], flush=True)
            lines = (place / f"perf-{clients}.csv").read_text().splitlines()
            rows.append(dict(zip(lines[0].split(","), lines[1].split(","), strict=False)))
    return {"tool": f"perf_analyzer of tritonclient {PERF_ANALYZER}", "rows": rows}


def _tool(installed: Installed, place: Path) -> tuple[Path, list[Path]]:
    """The program from tritonclient's wheel, with the libraries that pytriton carries."""
    folder = installed.folder / "perf_analyzer"
    tool = folder / "perf_analyzer"
    if not tool.is_file():
        wheels = place / "wheels"
        subprocess.run(
            [
                *(installed.python, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels),
                f"tritonclient=={PERF_ANALYZER}",
            ],
            check=True,
        )
        (wheel,) = wheels.glob("*.whl")
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/perf_analyzer")]
            tool.write_bytes(archive.read(name))
        tool.chmod(0o755)
        for wanted in ("libb64.so.0d", "libcudart.so.12"):
            start = wanted.split(".so")[0]
            found = [
                path
                for path in installed.libraries[0].iterdir()
                if path.name.startswith((f"{start}-", f"{start}."))
            ]
            if found:
                shutil.copy(found[0], folder / wanted)
    return tool, [folder, installed.libraries[0]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--perf-analyzer", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = Run(options.run)
    if not (run.path / FOLDER).is_dir():
        raise SystemExit("export the run first: mskip export --triton")
    with tempfile.TemporaryDirectory(dir=run.path) as scratch:
        place = Path(scratch)
        if options.soak:
            report = soak(run, options.soak, options.threads, place)
            print(json.dumps(report, indent=1))
        elif options.perf_analyzer:
            report = perf_analyzer(run, options.threads, place)
        else:
            report = throughput(run, options.rounds, options.threads, place)
            show_throughput(report)
    if options.output:
        signed = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(f"{requirements()[2]} in Triton's python backend", options.threads),
            "versions": versions(),
            **report,
        }
        write_json(options.output, signed)


if __name__ == "__main__":
    main()
