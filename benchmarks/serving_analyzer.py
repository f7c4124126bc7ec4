"""NVIDIA's perf_analyzer against a run's server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from serving_client import server_of

from mskip.compressor.artifact import Run
from mskip.exporters.onnx_export import MODEL
from mskip.exporters.triton.server import Installed, install_server

PERF_ANALYZER = "2.51.0"
"""Of tritonclient, whose wheel carries the tool."""


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
