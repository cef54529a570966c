"""How a page becomes HTML: the Jinja environment, its filters, and links to static files.

Owns no content. Pages are rendered here rather than by the framework's template plugin, so that
the console needs nothing of the composition root.
"""

import hashlib
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import Request, Response
from markupsafe import Markup

from app.console.tables import stackable
from app.core import clock
from app.core.money import format_nano
from app.organizations.signins import SignedIn
from app.settings import Settings
from runtime.protocol import TensorSpec

TEMPLATES_DIR = Path(__file__).resolve().parents[2] / "templates"
STATIC_DIR = Path(__file__).resolve().parent / "static"
STATIC_PATH = "/console/static"

PageRequest = Request[Any, Any, Any]

# Nothing runs or is styled but our own files; `connect-src` is for htmx, uploads and live pages.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`, which would make browsers send forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def page(
    request: PageRequest, template: str, *, status_code: int = 200, **context: Any
) -> Response[str]:
    """A whole page. Templates see the signed-in person as `person`, or None."""
    # An API key's holder may be behind an error page too, but is no person.
    auth = cast("dict[str, Any]", request.scope).get("auth")
    context.setdefault("person", auth if isinstance(auth, SignedIn) else None)
    context.setdefault("path", request.url.path)
    context.setdefault("notices", request.state.get("notices", ()))
    context.setdefault("notice", NOTICES.get(request.query_params.get("notice", "")))
    html = render(template, **context)
    return Response(
        html, status_code=status_code, media_type="text/html; charset=utf-8", headers=HEADERS
    )


def render(template: str, **context: Any) -> str:
    """A page or a part of one, as text."""
    return stackable(environment().get_template(template).render(**context))


def base_url(request: PageRequest) -> str:
    """Where people reach this box, as snippets should say: the configured address, else the one
    this browser uses."""
    settings: Settings = request.app.state.settings
    host = request.headers.get("host", "")
    return settings.url if settings.public_url or not host else f"{request.url.scheme}://{host}"


# What a redirect may say on the page it leads to; the URL carries only the word on the left.
NOTICES = {
    "signed-out": "You are signed out.",
    "deleted": "The model and its endpoint are gone. Its past usage and receipts stay.",
    "cancelled": "The build is being cancelled.",
    "stopped": "The endpoint is stopping. Calls to it are refused until you start it again.",
    "started": "The endpoint is starting.",
    "published": "The endpoint is open to every organization on this box. Whoever calls, pays.",
    "unpublished": "The endpoint is private to your organization again.",
    "rolled-back": "The endpoint is moving to the version you chose.",
    "budget": "The budget is set, and in force from the next request on.",
    "budget-gone": "The budget is gone. Nothing is refused because of it any more.",
    "recharge": "The saved card is charged whenever less is left than you said.",
    "recharge-off": "The saved card is not charged by itself any more.",
    "saved": "Saved.",
    "dismissed": "Dismissed. It comes back if it happens again.",
    "tested": "A test is on its way to the address. It arrives within seconds.",
    "credited": "The credit is there, and used from the next request on.",
    "limit": "The spending limit is changed, and in force from the next request on.",
    "prices-changed": "The new prices are in force. Requests admitted before keep theirs.",
    "prices-scheduled": "The new prices are scheduled. Until then you can take them back.",
    "prices-cancelled": "The scheduled price book is gone. The prices in force stay.",
    "compared": "The books have been compared.",
    "clock-confirmed": "The time is confirmed. Months that are over are being closed.",
    "device-cost": "The price of a device's hour is set.",
    "default": "The model is recommended. Calls of default are answered by it from now on.",
    "default-gone": "No model is recommended any more. Calls of default answer 404.",
    "invitation-revoked": "The invitation is revoked. Its link leads nowhere any more.",
    "role": "The role is changed, and in force from their next click on.",
    "removed": "They are no member any more. Revoke the keys that they know.",
    "left": "You have left the organization.",
    "switched": "You are in the other organization now.",
    "password": "The password is changed. Your other sessions have ended.",
    "revoked": "The key is revoked. Calls that use it are refused within a second.",
}


@cache
def environment() -> Environment:
    """The one Jinja environment: everything is escaped, and a name that is missing is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast("dict[str, Any]", made.filters)  # pyright: ignore[reportUnknownMemberType]
    filters.update(
        bytes=format_bytes,
        count=format_count,
        short=format_short,
        seconds=format_seconds,
        money=format_nano,
        tidy=format_tidy,
        moment=format_moment,
        day=format_day,
        ago=format_ago,
        axes=format_axes,
        values=format_values,
        said=format_message,
    )
    made.globals["asset"] = asset  # pyright: ignore[reportUnknownMemberType]
    return made


@cache
def asset(name: str) -> str:
    """The address of a static file; its content's hash lets browsers keep it for good."""
    digest = hashlib.sha256((STATIC_DIR / name).read_bytes()).hexdigest()
    return f"{STATIC_PATH}/{name}?v={digest[:12]}"


# --- filters ----------------------------------------------------------------------------


def format_bytes(num_bytes: int) -> str:
    """`3.4 MB`, in powers of 1000."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"), " ")


def format_short(number: int) -> str:
    """`2.5M`: a count in little room."""
    return _scaled(number, ("", "k", "M", "B", "T"), "")


def _scaled(number: int, units: tuple[str, ...], gap: str) -> str:
    size = float(number)
    index = 0
    while size >= 999.5 and index < len(units) - 1:
        size /= 1000
        index += 1
    digits = f"{size:.0f}" if index == 0 or size >= 99.5 else f"{size:.1f}"
    return f"{digits.removesuffix('.0')}{gap}{units[index]}".rstrip()


def format_count(number: int) -> str:
    """`12,345`."""
    return f"{number:,}"


def format_seconds(seconds: float) -> str:
    """`430 ms`, `2.4 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_tidy(nano: int, currency: str = "usd", places: int = 6) -> str:
    """`$12.50`, `$0.000104`: two decimals, and up to `places` where there are any."""
    text = format_nano(nano, currency, places)
    amount, gap, code = text.partition(" ")
    units, _, decimals = amount.partition(".")
    return f"{units}.{decimals.rstrip('0').ljust(2, '0')}{gap}{code}"


def format_moment(moment: datetime) -> str:
    """`2026-11-22 14:05:09 UTC`."""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def format_day(moment: datetime) -> str:
    """`22 Nov 2026`."""
    return f"{moment.day} {moment:%b %Y}"


def format_ago(moment: datetime) -> str:
    """`just now`, `5 min ago`, `3 h ago`, then the day."""
    seconds = (clock.now() - moment).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h ago"
    return format_day(moment)


def format_message(text: str) -> Markup:
    """An error's text: lines that are indented are code to copy, the rest is prose."""
    blocks: list[Markup] = []
    for is_code, lines in groupby(text.strip("\n").split("\n"), lambda line: line[:4] == "    "):
        joined = "\n".join(lines)
        if is_code:
            blocks.append(Markup("<pre>{}</pre>").format(dedent(joined)))
        elif joined.strip():
            blocks.append(Markup("<p>{}</p>").format(joined.strip()))
    return Markup("").join(blocks)


def format_axes(spec: TensorSpec, is_batched: bool) -> str:
    """`batch x 3 x 224 x 224`; a dynamic axis says what it may be: `any`, `up to 512`."""
    words = ["any" if size is None else str(size) for size in spec.shape]
    for axis, size in enumerate(spec.shape):
        least = spec.min_shape[axis] if spec.min_shape else 0
        most = spec.max_shape[axis] if spec.max_shape else None
        if axis == 0 and is_batched:
            words[axis] = "batch"
        elif size is None and most is not None:
            words[axis] = f"{least} to {most:,}" if least > 1 else f"up to {most:,}"
        elif size is None and least > 1:
            words[axis] = f"at least {least:,}"
    return " \N{MULTIPLICATION SIGN} ".join(words) or "scalar"


def format_values(spec: TensorSpec) -> str:
    """`0 to 30,521`, or a dash where nothing is known."""
    if spec.minimum is None or spec.maximum is None:
        return "\N{EN DASH}"
    return f"{spec.minimum:,.10g} to {spec.maximum:,.10g}"
