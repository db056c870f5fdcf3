"""What Prometheus reads of the scorer."""

from prometheus_client import Counter, Gauge, Histogram

CANDIDATES = Histogram(
    "hashtab_scorer_candidates",
    "Candidates of a request.",
    buckets=(0, 1, 10, 50, 100, 200, 300, 500, 700, 1000, 2000, 3000, 5000, 10000),
)
UNKNOWN_ITEMS = Counter(
    "hashtab_scorer_unknown_items", "Candidates that the catalogue does not know."
)
TABLES = Counter(
    "hashtab_scorer_tables",
    "Users' tables by what became of the reading: hit, miss, corrupt, foreign, failed (the store "
    "did not answer), skipped (it did not before and is not asked).",
    ["outcome"],
)
DEGRADED = Counter(
    "hashtab_scorer_degraded", "Answers from an empty history in place of a user's.", ["reason"]
)
READ_SECONDS = Histogram(
    "hashtab_scorer_store_read_seconds",
    "Seconds that the store took to give a user's table.",
    buckets=(5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
)
STALENESS = Gauge(
    "hashtab_scorer_table_staleness_seconds",
    "Seconds since all accepted events were in the tables, as the service that keeps them said "
    "last; NaN where none does.",
    multiprocess_mode="livemax",
)
STORE_UP = Gauge(
    "hashtab_scorer_store_up",
    "Whether the store answers; NaN without one.",
    multiprocess_mode="livemin",
)
MODEL = Gauge(
    "hashtab_scorer_model",
    "1 for the model that is served, 0 for those that were.",
    ["version", "digest", "fingerprint"],
    multiprocess_mode="livemax",
)
SWAPS = Counter("hashtab_scorer_swaps", "Times that another model came into use.")
SWAP_FAILURES = Counter(
    "hashtab_scorer_swap_failures",
    "Models that could not come into use: bundle (unusable), coverage (tables are missing).",
    ["reason"],
)
REGISTRY_UP = Gauge(
    "hashtab_scorer_registry_up",
    "Whether the registry's alias can be followed; NaN where a folder is.",
    multiprocess_mode="livemax",
)
