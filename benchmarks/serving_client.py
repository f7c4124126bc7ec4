"""A server of a run, and requests to it, for the measurements of `serving.py`."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from mskip.compressor.artifact import Run
from mskip.compressor.dial import saved_dial
from mskip.compressor.models import load_tokenizer
from mskip.exporters.triton.repository import MODELS, Deployment, write_repository
from mskip.exporters.triton.server import Installed, Ports, Server, free_ports, started


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
