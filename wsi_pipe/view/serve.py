"""Run the viewer on the loopback interface until it is told to stop."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable

import uvicorn

from wsi_pipe.errors import ConfigError
from wsi_pipe.view.app import make_app
from wsi_pipe.view.catalogue import Catalogue

__all__ = ["serve"]

LOOPBACK = "127.0.0.1"


def serve(catalogue: Catalogue, *, port: int = 0, browser: bool = False, tell: Callable[[str], object] = print) -> None:
    """Serve a catalogue on 127.0.0.1 until Ctrl-C or SIGTERM.

    port: 0 for any that is free. browser: open the page there. tell: gets the address, which holds a token that is new
    each time and that every request has to know. Raises ConfigError where the port is taken.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        # Who reads the address may ask at once, and waits until the server has started.
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} of {LOOPBACK} cannot be used: {error.strerror}",
            remedy="give another --port, or none for any that is free",
        ) from error
    token = secrets.token_urlsafe(16)
    address = f"http://{LOOPBACK}:{listening.getsockname()[1]}/{token}/"
    app = make_app(catalogue, token)
    # Requests hold the token, so none is logged.
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none")
    with listening:
        tell(address)
        if browser:
            webbrowser.open(address)
        uvicorn.Server(config).run(sockets=[listening])
