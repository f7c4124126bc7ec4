"""Starting and stopping a real server: `mskip serve`, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import WAIT


def test_a_server_that_cannot_start_says_why(
    make_repository: Callable[..., Path], tmp_path: Path
) -> None:
    """A damaged model, and a port that is taken."""
    import socket

    from mskip.compressor.errors import MskipError
    from mskip.exporters.triton.server import Ports, free_ports, install_server, started

    folder = make_repository()
    (folder / "models/generate/1/dial.json").unlink()
    log = tmp_path / "log.txt"
    with (
        pytest.raises(MskipError, match="the server ended"),
        started(install_server(), folder / "models", log, free_ports()),
    ):
        pass
    assert "dial.json" in log.read_text(encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = free_ports()
        ports = Ports(taken.getsockname()[1], ports.grpc, ports.metrics)
        with (
            pytest.raises(MskipError, match="cannot be had"),
            started(install_server(), folder / "models", log, ports),
        ):
            pass


def test_serve_lasts_until_ctrl_c(calibrated: Any, tmp_path: Path) -> None:
    """The command: it says where, serves, and leaves nothing behind."""
    import signal

    from mskip.exporters.triton.repository import Deployment, write_repository
    from mskip.exporters.triton.server import free_ports

    run = Path(shutil.copytree(calibrated.run.path, tmp_path / "run"))
    write_repository(
        calibrated.run,
        calibrated.tokenizer,
        calibrated.dial,
        Deployment(positions=128, sequences=2, threads=1),
        folder=run / "triton",
    )
    ports, page = free_ports(), free_ports().http
    options = {"--port": page, "--http-port": ports.http, "--grpc-port": ports.grpc}
    options["--metrics-port"] = ports.metrics
    command = [sys.executable, "-m", "mskip.cli.main", "serve", str(run)]
    command += [str(part) for pair in options.items() for part in pair]
    # Not in the checkout: mskip is what is installed.
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline()]
    while "curl" not in said[-1]:
        assert said[-1], said
        said.append(process.stdout.readline())
    assert any(f"http://127.0.0.1:{page}/" in line for line in said)
    asked = json.dumps({"text_input": "one", "max_tokens": 2}).encode()
    with urllib.request.urlopen(
        f"http://127.0.0.1:{page}/v2/models/generate/generate", asked
    ) as answer:
        assert "text_output" in json.loads(answer.read())
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, rest
    assert "stopped." in rest
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{ports.url}/v2/health/live", timeout=5)
