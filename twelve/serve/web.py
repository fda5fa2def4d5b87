"""What concerns browsers: the page, and keeping foreign pages out."""

import base64
import hashlib
import ipaddress
import re
from importlib import resources
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from twelve.serve.protocol import ApiError


class OwnPagesOnly:
    """Keeps foreign web pages from using a server on this machine through the browser of the person at it.

    A page may not name another origin than ours, and a connection over loopback must name a loopback host (a foreign
    name that resolves to 127.0.0.1 would pass as the same origin). Programs that are no browsers send no Origin.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            local = is_loopback((scope.get("server") or ("",))[0])
            foreign = origin is not None and not same_host(origin, host)
            unknown = local and not is_loopback(hostname(host))
            if foreign or unknown:
                said = "requests from other web pages are refused"
                if not foreign:
                    said = f"this server does not know the name {hostname(host)[:100]!r}: on this machine use localhost"
                error = ApiError(403, said, code="foreign_origin")
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def same_host(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def hostname(netloc: str) -> str:
    """`[::1]:8000` -> `::1`, `localhost:8000` -> `localhost`"""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 is 127.0.0.1
    return address.is_loopback or address.is_unspecified  # 0.0.0.0 is this machine, too, and no name to be rebound


def page():
    """The endpoint of the page. It may run its own script and style, named by their hashes, and nothing else."""
    html = resources.files("twelve.serve").joinpath("page/index.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def endpoint(http: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    return endpoint
