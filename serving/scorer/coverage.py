"""Whether users have the tables that a new model reads, before it is served."""

from itertools import islice

from hashtab.serving.store import TableStore

_SAMPLE = 1000  # users
_AT_ONCE = 64  # whose records of tens of kB are in memory together


class CoverageError(Exception):
    """A model whose tables are not there yet: says what is missing and what to do."""


def check_coverage(store: TableStore, before: bytes, after: bytes, share: float) -> None:
    """Check that a store can serve a new model as well as the present one.

    Where a service keeps the new model's tables up to date, it says when all are there. Else a
    sample of the present model's users is looked up.

    Args:
        store: of the tables.
        before: fingerprint of the model that is served.
        after: of the new one.
        share: of the sample that must have a table of the new model.

    Raises:
        CoverageError: if too many have none.
        StoreError: if the store cannot say.
    """
    if before == after:
        return
    kept = store.kept_models().get(after)
    if kept is not None:
        if kept.state != "live":
            raise CoverageError(
                f"the tables of fingerprint {after.hex()} are {kept.state} in {store.name}; the "
                "model is served when they are live"
            )
        return
    sample = islice(store.users(before), _SAMPLE)
    asked = found = 0
    while users := list(islice(sample, _AT_ONCE)):
        asked += len(users)
        found += sum(record is not None for record in store.get(after, users))
    if found < share * asked:
        raise CoverageError(
            f"{found} of {asked} users with a table of fingerprint {before.hex()} have one of "
            f"{after.hex()} in {store.name}, and {share:.0%} are wanted: encode users with the "
            "new bundle, or have it kept"
        )
