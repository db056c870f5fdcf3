"""The page at `/`: a person types a user and sees history, candidates and why; plain files."""

from pathlib import Path

from hashtab.serving.http import Call, Endpoint, Reply

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8", "A page for people: recommendations and why."),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8", "The page's script."),
    "/page/page.css": ("page.css", "text/css; charset=utf-8", "The page's style."),
}
# The page runs its own script and talks to its own server, whatever an item's name may hold.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def endpoints() -> list[Endpoint]:
    """Return the endpoints of the page's files, read once."""
    return [_endpoint(path, *described) for path, described in _FILES.items()]


def _endpoint(path: str, name: str, media_type: str, summary: str) -> Endpoint:
    reply = Reply((_FOLDER / name).read_bytes(), headers=_HEADERS, media_type=media_type)

    async def handle(call: Call) -> Reply:  # noqa: ARG001  the same for every call
        return reply

    return Endpoint(method="GET", path=path, handle=handle, replies=bytes, summary=summary)
