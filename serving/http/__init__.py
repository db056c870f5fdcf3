"""The HTTP foundation of the services: routing, checks, admission, metrics, logs and processes.

A service lists its endpoints; everything that is the same for all of them happens here.
"""

from hashtab.serving.http.app import build_app
from hashtab.serving.http.command_line import add_server_arguments, server_settings
from hashtab.serving.http.errors import HttpError, SettingsError
from hashtab.serving.http.run import run
from hashtab.serving.http.service import Call, Endpoint, Reply, Service
from hashtab.serving.http.settings import ServerSettings

__all__ = [
    "Call",
    "Endpoint",
    "HttpError",
    "Reply",
    "ServerSettings",
    "Service",
    "SettingsError",
    "add_server_arguments",
    "build_app",
    "run",
    "server_settings",
]
