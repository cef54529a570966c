"""The guides in `docs/`, served as pages under `/guide` to everybody: nothing in them is of an
organization, and whoever cannot sign in needs them most."""

import asyncio
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from litestar import Response, Router, get
from litestar.params import FromPath

from app.console.markdown import GUIDE_PATH, Document, read_document
from app.console.sessions import session_token
from app.console.templating import PageRequest, page
from app.core.errors import NotFound, Unauthenticated
from app.organizations.signins import SignIns

DOCS_DIR = Path(__file__).resolve().parents[2] / "docs"

# In the order in which people need them; a document that is not named here comes last.
GROUPS: dict[str, tuple[str, ...]] = {
    "Start": ("quickstart-caller", "quickstart-owner", "quickstart-operator"),
    "Call models": ("api-chat", "api-predict", "clients", "receipts"),
    "Bring models": ("uploads", "formats", "models", "optimising"),
    "Prices and money": (*("pricing", "money", "payments", "billing-invoices", "books", "stripe"),),
    "Run a box": ("people", "operations", "security", "design"),
}
REST = "More"


class Entry(msgspec.Struct, frozen=True):
    """One document; its name is that of its file, without the ending."""

    name: str
    document: Document


@cache
def library() -> dict[str, Entry]:
    """All documents by name. Read once: they change with the code alone."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS_DIR.glob("*.md"))}
    titles = {path.name: text.partition("\n")[0].removeprefix("# ") for path, text in texts.items()}
    return {
        path.stem: Entry(path.stem, read_document(text, titles)) for path, text in texts.items()
    }


@cache
def groups() -> dict[str, list[Entry]]:
    """The documents under the headings of the list."""
    entries = library()
    named = {name for names in GROUPS.values() for name in names}
    listed = GROUPS | {REST: tuple(name for name in entries if name not in named)}
    found = {
        title: [entries[name] for name in names if name in entries]
        for title, names in listed.items()
    }
    return {title: members for title, members in found.items() if members}


async def recognise(request: PageRequest) -> None:
    """Shows somebody who is signed in the console around the page; anybody may read it."""
    sign_ins: SignIns = request.app.state.sign_ins
    if token := session_token(request):
        with suppress(Unauthenticated):
            request.scope["auth"] = await sign_ins.authenticate(token)


@get(GUIDE_PATH)
async def list_guides(request: PageRequest) -> Response[str]:
    """All guides, with what each is about."""
    return page(request, "guide/list.html", groups=await asyncio.to_thread(groups))


@get(f"{GUIDE_PATH}/{{name:str}}")
async def show_guide(request: PageRequest, name: FromPath[str]) -> Response[Any]:
    """One guide."""
    listed = await asyncio.to_thread(groups)
    entry = library().get(name)
    if entry is None:
        raise NotFound(f"There is no guide {name!r}. All of them are listed at {GUIDE_PATH}.")
    return page(request, "guide/guide.html", groups=listed, entry=entry)


router = Router("/", route_handlers=[list_guides, show_guide], before_request=recognise)
