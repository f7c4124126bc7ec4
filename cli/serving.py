"""`mskip serve` and `mskip lint`: a run's repository on a real server, and against its rules."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mskip.cli import console, tables
from mskip.cli.options import GATE_FAILED, AsJson, RunFolder

if TYPE_CHECKING:
    from mskip.exporters.triton.server import Server

app = typer.Typer()

_PANEL = "Around a run"


@app.command(rich_help_panel=_PANEL, epilog="Example: mskip serve --check")
def serve(
    run: RunFolder = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", metavar="", help="Run the repository's smoke test on free ports, and stop."
        ),
    ] = False,
    port: Annotated[int, typer.Option(min=0, metavar="PORT", help="Of the page.")] = 8080,
    http_port: Annotated[int, typer.Option(min=1, metavar="PORT", help="Of the server.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, metavar="PORT", help="Of the server.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, metavar="PORT", help="Of the server.")] = 8002,
    as_json: AsJson = False,
) -> None:
    """Serve a run with Triton Inference Server on this machine, with a page to look at."""
    from mskip.compressor.artifact import open_run
    from mskip.compressor.errors import ArtifactError
    from mskip.compressor.files import read_json
    from mskip.exporters.triton.repository import FOLDER, MODELS, RECORD
    from mskip.exporters.triton.server import Ports, free_ports, install_server, started

    opened = open_run(run)
    folder = opened.path / FOLDER
    record = read_json(folder / RECORD, "Triton repository", "Make it with: mskip export --triton")
    if record["backend"] != "python":
        raise ArtifactError(
            f"{folder} is for the {record['backend']} backend, which the server that mskip can "
            "install does not have.",
            "Serve it with docker (its README.md says how), or: mskip export --triton",
        )
    ports = free_ports() if check else Ports(http_port, grpc_port, metrics_port)
    with console.progress() as progress:
        installed = install_server(progress)
    log = opened.reports / "serve.log"
    with started(installed, folder / MODELS, log, ports) as server:
        report = _checked(folder, server) if check else _until_stopped(server, port)
    report["run"] = str(opened.path)
    console.emit(report, as_json, _show)
    if not report.get("passed", True):
        raise typer.Exit(GATE_FAILED)


def _checked(folder: Path, server: Server) -> dict[str, Any]:
    """Run the client that lies in the repository."""
    command = [sys.executable, str(folder / "client.py"), "--url", server.ports.url]
    command += ["--metrics", server.ports.metrics_url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks = list[dict[str, Any]]()
    for line in done.stdout.splitlines():
        mark, name, seconds, _, words = line.split(maxsplit=4)
        checks.append(
            {"name": name, "passed": mark == "ok", "seconds": float(seconds), "found": words}
        )
    report = {"passed": done.returncode == 0, "checks": checks}
    return {**report, "error": done.stderr.strip()} if done.stderr else report


def _show(report: dict[str, Any]) -> None:
    if "checks" not in report:
        console.say("stopped.")
        return
    console.table(
        "Smoke test",
        ["check", "", ">time", "found"],
        [
            [
                each["name"].replace("_", " "),
                console.verdict(each["passed"]),
                console.seconds(each["seconds"]),
                each["found"],
            ]
            for each in report["checks"]
        ],
    )
    if "error" in report:
        console.say(report["error"])


def _until_stopped(server: Server, port: int) -> dict[str, Any]:
    """Wait for Ctrl-C, or for the server to end."""
    from mskip.exporters.triton.page import page_served

    stop = threading.Event()
    before = {
        each: signal.signal(each, lambda *_: stop.set()) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with page_served(server.ports, port) as page:
            _say_where(server, page)
            while not stop.wait(0.5) and server.process.poll() is None:
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = server.process.poll()
    if ended is not None:
        from mskip.compressor.errors import MskipError

        raise MskipError(f"the server ended by itself, status {ended}.", f"See {server.log}.")
    return {"stopped": True}


def _say_where(server: Server, page: str) -> None:
    url = server.ports.url
    body = '{"text_input": "Why is the sky blue?", "chat": true, "max_tokens": 64}'
    console.say("ready. Stop with Ctrl-C.")
    console.say(f"page     {page}", whole=True)
    console.say(f"metrics  {server.ports.metrics_url}/metrics", whole=True)
    console.say(f"curl -s {url}/v2/models/generate/generate -d '{body}'", whole=True)


@app.command(rich_help_panel=_PANEL, epilog="Example: mskip lint runs/smollm2-135m")
def lint(run: RunFolder = None, as_json: AsJson = False) -> None:
    """Hold a run's Triton repository against the server's rules, its contract and its graph."""
    from mskip.compressor.artifact import open_run
    from mskip.exporters.triton.lint import lint as look
    from mskip.exporters.triton.repository import FOLDER

    report = look(open_run(run).path / FOLDER)
    console.emit(report, as_json, tables.linted)
    if report["faults"]:
        raise typer.Exit(GATE_FAILED)
