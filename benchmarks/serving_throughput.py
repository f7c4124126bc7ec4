"""Tokens per second and latency of routed and dense at 1, 4 and 16 requests at a time."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from serving_client import prompts, request, server_of

from mskip.compressor.artifact import Run
from mskip.exporters.onnx_export import DENSE, MODEL
from mskip.exporters.triton.server import Ports, install_server

TOKENS = 32


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
