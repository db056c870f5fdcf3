"""The error of an index that cannot be used."""

from hashtab.serving.errors import BundleError


class RetrievalError(BundleError):
    """An index of items that cannot be used: names it, what is wrong, and what to do about it."""
