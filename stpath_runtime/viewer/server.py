"""The viewer's server on this machine: a port, a token, and one line that says the address."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from ..errors import InstallError, OptionError
from .shown import Shown

OWN_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; port 0 means any that is free.

    Raises
    ------
    OptionError
        If the port is taken, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, port))
            opened.listen(128)
        except OSError as error:
            raise OptionError(
                f"--host {host} --port {port}: {error.strerror or error}; give another --port, or leave it out for any "
                "that is free"
            ) from error
        yield opened


def require_starlette() -> None:
    """Raise InstallError, with what to install, where the server's libraries are not."""
    from importlib.util import find_spec

    if lacking := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise InstallError(f"the viewer needs {' and '.join(lacking)}; run: pip install 'stpath-engine[view]'")


def serve(shown: Shown, host: str, port: int, on_start: Callable[[str], None], **how: Any) -> None:
    """Serve the viewer of a prediction until the process is asked to stop.

    Parameters
    ----------
    on_start
        Called with the address, token included, once it answers.
    """
    with listening(host, port) as opened:
        server, address = _server(shown, host, opened, **how)
        on_start(address)
        server.run(sockets=[opened])


@contextmanager
def served(shown: Shown, host: str = "127.0.0.1", port: int = 0, **how: Any) -> Iterator[str]:
    """The address of a viewer that is served in a thread for as long as the block runs."""
    with listening(host, port) as opened:
        server, address = _server(shown, host, opened, **how)
        server.install_signal_handlers = lambda: None
        thread = Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(5)


def _server(shown: Shown, host: str, opened: socket.socket, **how: Any) -> tuple[Any, str]:
    import uvicorn

    from .app import create_app

    token = secrets.token_urlsafe(32)
    port = opened.getsockname()[1]
    beyond = host not in OWN_NAMES
    names = OWN_NAMES | {host.casefold()} | ({socket.gethostname().casefold()} if beyond else frozenset())
    app = create_app(shown, token, names, beyond, **how)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False)
    name = f"[{host}]" if ":" in host else host
    return uvicorn.Server(config), f"http://{name}:{port}/?token={token}"
