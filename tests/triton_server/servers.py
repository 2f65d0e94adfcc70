"""A Triton server of the tests' own: `make test-triton` installs it, and its clients, into .venv/triton."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ENVIRONMENT = Path(sys.prefix) / "triton"
PACKAGES = ENVIRONMENT / "lib" / "python3.11" / "site-packages"
SERVER = PACKAGES / "pytriton" / "tritonserver"
if (ENVIRONMENT / ".installed").exists():
    sys.path.append(str(PACKAGES))  # the clients; what the tests' environment has of its own comes first


@dataclass
class Triton:
    """A running server."""

    process: subprocess.Popen
    http: str
    grpc: str
    log: Path


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def start(repository: Path, log: Path) -> Triton:
    """Start a server on this machine alone, with the models of its Python backend, the only one that it has."""
    http, grpc = free_ports()
    command = [
        str(SERVER / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={SERVER / 'backends'}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in ("stpath", "stpath_tiles") if (repository / name).is_dir()),
        *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--exit-timeout-secs=10", "--log-verbose=1"),
    ]
    environment = {**os.environ, "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"}  # whose packages models import
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Triton(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)


@contextmanager
def running(repository: Path, log: Path) -> Iterator[Triton]:
    """A server that is ready; it is stopped whatever happens."""
    import tritonclient.http

    server = start(repository, log)
    try:
        client = tritonclient.http.InferenceServerClient(server.http)
        for _ in range(600):
            with suppress(OSError):  # refused: it does not listen yet
                if client.is_server_ready():
                    break
            assert server.process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.1)
        else:
            pytest.fail(f"the server is not ready after a minute:\n{log.read_text()[-4000:]}")
        client.close()
        yield server
    finally:
        stop(server)


def stop(server: Triton) -> None:
    server.process.terminate()
    try:
        server.process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.process.pid, signal.SIGKILL)  # the server and its models' processes: a group of their own
        server.process.wait()
