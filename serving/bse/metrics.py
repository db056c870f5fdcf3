"""What Prometheus reads of the BSE service."""

from prometheus_client import Counter, Gauge, Histogram

_MS = (0.5, 1, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000, 5000)

EVENTS = Counter(
    "hashtab_bse_events", "Events by source and what became of them.", ["source", "outcome"]
)
COMMIT_SECONDS = Histogram(
    "hashtab_bse_commit_seconds",
    "Seconds of one durable change of log and tables.",
    buckets=[ms / 1000 for ms in _MS],
)
COMMIT_EVENTS = Histogram(
    "hashtab_bse_commit_events",
    "Events of one change.",
    buckets=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000],
)
WAITING = Gauge(
    "hashtab_bse_events_waiting", "Events that wait to be written.", multiprocess_mode="livesum"
)
LAG_SECONDS = Gauge(
    "hashtab_bse_event_lag_seconds",
    "Seconds between the time of the latest event that was written and its being written.",
    multiprocess_mode="livemostrecent",
)
EXPIRED = Counter("hashtab_bse_events_expired", "Events that left log and tables by the plan.")
MODELS = Gauge(
    "hashtab_bse_models", "Kept models by state.", ["state"], multiprocess_mode="livemostrecent"
)
BUILT_USERS = Gauge(
    "hashtab_bse_build_users",
    "Users of the log that the build under way has looked at.",
    multiprocess_mode="livemax",
)
FAILURES = Counter("hashtab_bse_failures", "Work that failed and is tried again.", ["work"])
REJECTED = Counter(
    "hashtab_bse_stream_rejected", "Entries of the stream that are no events, put aside."
)
