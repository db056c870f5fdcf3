"""Runs a service on a port, in this process or in several, until it is told to stop."""

import logging
import socket

from hashtab.serving.http.creation import Create, service_of
from hashtab.serving.http.errors import SettingsError
from hashtab.serving.http.logs import log_as_json
from hashtab.serving.http.processes import supervise
from hashtab.serving.http.server import serve
from hashtab.serving.http.settings import ServerSettings

_BACKLOG = 2048  # connections that wait to be taken

_log = logging.getLogger("hashtab.serving")


def run(create: Create, settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT; then finish what is in flight.

    With several processes this one only watches over them: it starts those again that die, and
    never makes a service. Naming the function as text keeps the service's imports out of it.

    Args:
        create: makes the service in each process: `"package.module:function"`, or a function (or
            `functools.partial` of one) that can be pickled, so of a module and not of a script.
        settings: of the server.

    Returns:
        The exit code: 0 if all went well.

    Raises:
        SettingsError: if nothing can listen at the host and port, or there is no such function.
    """
    service = service_of(create) if settings.processes == 1 else None
    with _listen(settings.host, settings.port) as listener:
        log_as_json()
        url = _url(listener)
        fields = {"url": url, "try": f"curl {url}/health/ready", "processes": settings.processes}
        _log.info("listening", extra={"fields": fields})
        if service is None:
            return supervise(create, settings, listener)
        return serve(service, settings, listener, start_first=False)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; "
            "choose another host or port, 0 for a free one"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
