"""What Prometheus reads of a server.

A service adds its own by plain `prometheus_client` objects at the top of one of its modules, named
`hashtab_...`; `/metrics` shows whatever is in the default registry. Two things to heed:

- `Gauge` needs `multiprocess_mode` ("livesum", "livemax", "livemostrecent", ...), for several
  processes; `set_function`, `Info` and custom collectors do not work there.
- `labels(...)` costs as much as the update itself: keep what it returns where a request comes by.
"""

import os

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when first imported

_MS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000)

REQUESTS = Counter(
    "hashtab_http_requests", "Requests by endpoint and status.", ["endpoint", "status"]
)
SECONDS = Histogram(
    "hashtab_http_request_seconds",
    "Seconds from a request's head to its answer, of requests that were not refused.",
    ["endpoint"],
    buckets=[ms / 1000 for ms in _MS],
)
REFUSED = Counter(
    "hashtab_http_refused",
    "Requests that were not worked on: too many waited (full), the deadline passed (deadline), the "
    "client left (gone), it was not HTTP (broken), its head was too large (head), it came too "
    "slowly (slow), too many connections were open (connections).",
    ["reason"],
)
IN_FLIGHT = Gauge(
    "hashtab_http_requests_in_flight",
    "Requests that are not answered yet, as of the last second.",
    multiprocess_mode="livesum",
)
WAITING = Gauge(
    "hashtab_http_requests_waiting",
    "Requests that wait for their turn to work, as of the last second.",
    multiprocess_mode="livesum",
)


def render() -> tuple[bytes, str]:
    """Return all metrics, of all processes where there are several, and their media type."""
    if MULTIPROCESS_FOLDER not in os.environ:
        registry = prometheus_client.REGISTRY
    else:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST
