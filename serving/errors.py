"""The errors of scoring that a user's bundle or request can cause."""


class BundleError(ValueError):
    """A bundle that cannot be used: names the file, what is wrong, and what to do about it."""


class BundleFormatError(BundleError):
    """A bundle that another version of hashtab wrote."""


class RequestError(ValueError):
    """Requests that cannot be scored: says which, what is wrong, and what to do about it."""
