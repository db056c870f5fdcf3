#!/usr/bin/env python3
"""Serve scorers on a Ray cluster: so many replicas of the same application behind Ray's proxies.

`python pipelines/serve_on_ray.py --bundle BUNDLE --store redis://host:6379/0 --replicas 4` needs
`pip install 'hashtab[ray]'`. Bundle and store must be where every node sees them. On one machine
`python -m hashtab.serving.scorer` does the same at less cost a request: there is no proxy.
"""

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import DEFAULT_TRACKING
from hashtab.serving.http import ServerSettings, build_app
from hashtab.serving.http import SettingsError as ServerSettingsError
from hashtab.serving.http.app import App
from hashtab.serving.http.command_line import read_token
from hashtab.serving.scorer.service import ScorerService
from hashtab.serving.scorer.settings import ScorerSettings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "hashtab"


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Settings of scorers on a cluster. A token is read from the variable HASHTAB_TOKEN.

    Args:
        bundle: folder of a bundle, or models:/<name>@<alias> in the registry; followed when it
            changes.
        store: URL of the user tables, redis://host:port/database where there are several nodes.
        replicas: of the scorer.
        cores: of each replica.
        host: that Ray's proxies listen at.
        port: that they listen at.
        address: of a Ray cluster, for example auto; by default one of this machine's own.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str | None = None
    store: str | None = None
    replicas: int = 1
    cores: float = 1.0
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.replicas < 1 or not self.cores > 0:
            raise SettingsError(
                f"replicas and cores must be positive, got {self.replicas}, {self.cores}"
            )

    @property
    def server(self) -> ServerSettings:
        """How the application is served.

        Raises:
            hashtab.serving.http.SettingsError: if a host that others can reach has no token.
        """
        return ServerSettings(host=self.host, port=self.port, token=read_token(None))


def build_scorer(settings: RaySettings, server: ServerSettings) -> App:
    """Return the application of one replica, which follows the bundle by itself."""
    # Gone with the replica's process; each has one of its own, since nodes share no folders.
    state = Path(tempfile.mkdtemp(prefix="hashtab-scorer-"))
    scorer = ScorerSettings(
        bundle=str(settings.bundle),
        state=state,
        store=settings.store,
        tracking_uri=settings.tracking_uri,
    )
    return build_app(ScorerService(scorer), server)


def application(settings: RaySettings, server: ServerSettings) -> "Application":
    """Return the application that `ray.serve.run` deploys."""
    from ray import serve  # slow to import, and an extra

    def build() -> App:
        return build_scorer(settings, server)

    deployment = serve.deployment(
        name="scorer",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cores},
        # The application refuses early itself; a few more than it lets wait must reach it.
        max_ongoing_requests=2 * server.max_waiting,
    )
    return deployment(serve.ingress(build)()).bind()


@contextmanager
def deployed(settings: RaySettings, server: ServerSettings) -> Iterator[None]:
    """Deploy on the cluster that this process is connected to, until the block ends."""
    from ray import serve

    serve.start(http_options={"host": server.host, "port": server.port})
    serve.run(application(settings, server), name=NAME, route_prefix="/")
    try:
        yield
    finally:
        serve.delete(NAME)


def main(arguments: list[str] | None = None) -> int:
    """Parse, deploy and wait; what cannot be deployed ends with one line and exit code 2."""
    try:
        settings = parse(RaySettings, arguments, __doc__)
        if settings.bundle is None:
            raise SettingsError("--bundle must name a folder or a registered model")
        server = settings.server  # refused before a cluster is started for it
        cores = int(settings.replicas * settings.cores) + 1  # and one for Ray's proxy
        with cluster(cores, settings.address), deployed(settings, server):
            url = f"http://{server.host}:{server.port}"
            print(f"scorers at {url}; Ctrl-C ends them", flush=True)
            signal.pause()
    except (SettingsError, ServerSettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; pip install 'hashtab[ray]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
