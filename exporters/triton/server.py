"""A real Triton Inference Server on this machine, in an environment of its own.

NVIDIA publishes the server with its python backend inside the wheel of nvidia-pytriton. It wants
numpy 1, so it does not share our environment; both speak over HTTP and gRPC.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mskip.compressor.embedded import cache_home
from mskip.compressor.errors import MskipError
from mskip.compressor.progress import Progress, silent

PYTRITON = "0.7.0"
"""Of nvidia-pytriton; it carries tritonserver 2.51."""
NUMPY = "1.26.4"
HOST = "127.0.0.1"
_DOCKER = "Serve the folder with docker instead: its README.md has the command."


@dataclass(frozen=True)
class Ports:
    """Where a server listens.

    Attributes:
        http: requests over HTTP.
        grpc: requests over gRPC.
        metrics: for Prometheus.
    """

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @property
    def url(self) -> str:
        """Of HTTP."""
        return f"http://{HOST}:{self.http}"

    @property
    def metrics_url(self) -> str:
        """Of the metrics' endpoint, without its path."""
        return f"http://{HOST}:{self.metrics}"


def free_ports() -> Ports:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(3)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return Ports(*(each.getsockname()[1] for each in sockets))
    finally:
        for each in sockets:
            each.close()


def requirements() -> list[str]:
    """What the server's environment gets: the runtimes are those of this one."""
    wanted = [f"nvidia-pytriton=={PYTRITON}", f"numpy=={NUMPY}"]
    for package in ("onnxruntime", "tokenizers"):
        try:
            wanted.append(f"{package}=={metadata.version(package)}")
        except metadata.PackageNotFoundError:
            wanted.append(package)
    return wanted


@dataclass(frozen=True)
class Installed:
    """A server that can be started.

    Attributes:
        folder: of its environment.
    """

    folder: Path

    def has(self, wanted: Sequence[str]) -> bool:
        """Whether these packages were installed to the end."""
        ready = self.folder / "ready.txt"
        return ready.is_file() and ready.read_text(encoding="utf-8").split() == list(wanted)

    @property
    def python(self) -> Path:
        """Interpreter of its environment."""
        return self.folder / "bin/python"

    @property
    def program(self) -> Path:
        """The server."""
        return self.folder / "server/bin/tritonserver"

    @property
    def libraries(self) -> list[Path]:
        """Folders of the libraries that it and its python stub are linked with."""
        return [self._packages / "nvidia_pytriton.libs", _libpython()]

    @property
    def _packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def place_server(self) -> None:
        """Put the server where its backends find the stub for this Python."""
        source = self._packages / "pytriton/tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise MskipError(
                f"nvidia-pytriton {PYTRITON} has no stub for Python {version}.", _DOCKER
            )
        target = self.folder / "server"
        shutil.rmtree(target, ignore_errors=True)
        ignore = shutil.ignore_patterns("python_backend_stubs")
        shutil.copytree(source, target, ignore=ignore)
        shutil.copy2(stub, target / "backends/python/triton_python_backend_stub")


def _libpython() -> Path:
    """The folder of libpython, which the python backend's stub is linked with.

    Raises:
        MskipError: this Python has none.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib", "/usr/lib"]
    folders += [
        sysconfig.get_config_var("LIBDIR") + "/" + str(sysconfig.get_config_var("MULTIARCH"))
    ]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder)
    raise MskipError(
        f"this Python has no {name}, which Triton's python backend needs.",
        f"Install a Python with a shared library (--enable-shared). {_DOCKER}",
    )


def _check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise MskipError("tritonserver is published for Linux on x86-64 only.", _DOCKER)
    _libpython()


def _place() -> Installed:
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Installed(cache_home() / f"triton-{PYTRITON}-{version}")


def server_state() -> tuple[bool, str]:
    """Whether a server is installed, and words about it; nothing is installed."""
    try:
        _check_machine()
    except MskipError as error:
        return False, error.message
    if _place().has(requirements()):
        return True, f"that of nvidia-pytriton {PYTRITON}, in mskip's cache"
    return False, "none yet"


def install_server(progress: Progress = silent) -> Installed:
    """The server's environment, made on first use in mskip's cache.

    Args:
        progress: one unit a part.

    Raises:
        MskipError: not Linux on x86-64, no libpython, or the packages cannot be installed.
    """
    _check_machine()
    wanted, installed = requirements(), _place()
    ready = installed.folder / "ready.txt"
    if installed.has(wanted):
        return installed
    installed.folder.parent.mkdir(parents=True, exist_ok=True)
    with installed.folder.with_name(f"{installed.folder.name}.lock").open("w") as lock:
        # Another process may be at it; what it made is good for us too.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.has(wanted):
            _install(installed, wanted, progress)
            ready.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    return installed


def _install(installed: Installed, wanted: list[str], progress: Progress) -> None:
    progress("server", 0, 3, "environment")
    shutil.rmtree(installed.folder, ignore_errors=True)
    try:
        venv.create(installed.folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MskipError(f"no environment at {installed.folder}: {error}.", _DOCKER) from error
    progress("server", 1, 3, "packages")
    install = [str(installed.python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    done = subprocess.run([*install, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or ["pip said nothing."]
        raise MskipError(
            f"the server's packages cannot be installed: {told[-1]}",
            f"Try: {installed.python} -m pip install {' '.join(wanted)}",
        )
    progress("server", 2, 3, "server")
    installed.place_server()
    progress("server", 3, 3)


class Server:
    """A server that runs; see `started`.

    Attributes:
        ports: where it listens.
        process: of it.
        log: what it says.
    """

    def __init__(self, ports: Ports, process: subprocess.Popen[bytes], log: Path) -> None:
        self.ports, self.process, self.log = ports, process, log

    def wait_ready(self, timeout: float) -> None:
        """Return once all models are loaded.

        Raises:
            MskipError: it ended, or took longer than ``timeout`` seconds; names the log.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise MskipError(f"the server ended: {self._complaint()}", f"See {self.log}.")
            try:
                with urllib.request.urlopen(f"{self.ports.url}/v2/health/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise MskipError(f"the server is not ready after {timeout:.0f} s.", f"See {self.log}.")

    def stop(self) -> int:
        """End it as Ctrl-C would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def _complaint(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("E") or "failed" in line.lower()]
        return (errors or lines or ["it said nothing."])[-1].strip()


@contextmanager
def started(
    installed: Installed,
    models: Path,
    log: Path,
    ports: Ports,
    *,
    options: Sequence[str] = (),
    timeout: float = 300.0,
) -> Iterator[Server]:
    """A server of a model repository, ready; it ends with the block.

    Args:
        installed: the server.
        models: the folder that it is pointed at.
        log: receives what it says.
        ports: where it listens, on the loopback interface only.
        options: further ones of tritonserver.
        timeout: seconds until it must be ready.

    Raises:
        MskipError: a port is taken, or it does not become ready.
    """
    _check_free(ports)
    libraries = [str(path) for path in installed.libraries]
    path = f"{installed.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "LD_LIBRARY_PATH": ":".join(libraries)}
    kept = ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")
    environment |= {name: os.environ[name] for name in kept if name in os.environ}
    command = [
        str(installed.program),
        f"--model-repository={models.resolve()}",
        f"--backend-directory={installed.folder / 'server/backends'}",
        *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--exit-timeout-secs=5",
        *options,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        # A group of its own: Ctrl-C is for us, and we stop the server in order.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        server = Server(ports, process, log)
        try:
            server.wait_ready(timeout)
            yield server
        finally:
            server.stop()


def _check_free(ports: Ports) -> None:
    for name in ("http", "grpc", "metrics"):
        port = getattr(ports, name)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise MskipError(
                    f"port {port} on {HOST} cannot be had: {error.strerror}.",
                    f"Stop what listens there, or choose another: --{name}-port",
                ) from error
