"""Markdown as HTML of the console: headings with anchors, links between guides, tables and code in
the console's own parts. Raw HTML in a text is shown as text; nothing is styled inline, which the
pages' content security policy would refuse."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from markupsafe import Markup, escape

Tokens = Sequence[Token]
DOCUMENT = re.compile(r"^([a-z0-9-]+)\.md(#.*)?$")
GUIDE_PATH = "/guide"


class Section(msgspec.Struct, frozen=True):
    """A heading of the second level."""

    anchor: str
    title: str


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """`summary` is the first sentence after the title, as plain text."""

    title: str
    summary: str
    sections: list[Section]
    html: Markup


def read_document(text: str, titles: Mapping[str, str] | None = None) -> Document:
    """Renders a document that begins with its title. A link that is called by its file's name, as
    in `[money.md](money.md)`, is called by that one's title in `titles`."""
    markdown = _markdown()
    env: dict[str, Any] = {}
    tokens = markdown.parse(text, env)
    sections: list[Section] = []
    title, paragraphs = "", list[str]()
    anchors = anchors_of(tokens)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            anchor, words = next(anchors), plain(tokens[i + 1])
            token.attrSet("id", anchor)
            if token.tag == "h1":
                title = words
            elif token.tag == "h2":
                sections.append(Section(anchor, words))
        elif token.type == "paragraph_open" and not paragraphs:
            paragraphs.append(plain(tokens[i + 1]))
        elif token.type == "inline":
            lead_to_pages(token.children or [], titles or {})
        elif token.type == "th_open" and not tokens[i + 1].content:
            token.tag = tokens[i + 2].tag = "td"  # a corner, which heads nothing
        elif token.type in ("th_open", "td_open") and "right" in str(token.attrs.pop("style", "")):
            token.attrSet("class", "number")
    html = markdown.renderer.render(tokens, markdown.options, env)
    summary = re.split(r"(?<=\.) ", paragraphs[0] if paragraphs else "", maxsplit=1)[0]
    return Document(
        title=title,
        summary=summary,
        sections=sections,
        html=Markup(html),  # noqa: S704 - raw HTML is off, so all of it is the renderer's own
    )


def anchors_of(tokens: Tokens) -> Iterator[str]:
    """The anchors of all headings in their order, as GitHub makes them."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            words = re.sub(r"[^\w\- ]", "", plain(tokens[i + 1]).lower()).replace(" ", "-")
            number = seen[words] = seen.get(words, -1) + 1
            yield f"{words}-{number}" if number else words


def lead_to_pages(children: Tokens, titles: Mapping[str, str]) -> None:
    """Turns the links between documents into links between their pages."""
    for opening, named in pairwise(children):
        if opening.type == "link_open":
            opening.attrSet("href", page_address(str(opening.attrGet("href"))))
            named.content = titles.get(named.content, named.content)


def page_address(target: str) -> str:
    """Where a link leads in the console: `stripe.md#x` is another guide, all else stays."""
    found = DOCUMENT.match(target)
    return f"{GUIDE_PATH}/{found[1]}{found[2] or ''}" if found else target


def plain(inline: Token) -> str:
    """The text of a heading or a paragraph without its marks."""
    children = inline.children or []
    return "".join(" " if child.type == "softbreak" else child.content for child in children)


@cache
def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False}).enable("table")
    made.add_render_rule("table_open", _open_table)
    made.add_render_rule("table_close", _close_table)
    made.add_render_rule("fence", _code)
    made.add_render_rule("code_block", _code)
    return made


def _open_table(
    renderer: RendererHTML, tokens: Tokens, i: int, options: OptionsDict, env: EnvType
) -> str:
    number = sum(token.type == "table_open" for token in tokens[: i + 1])
    # A wide table scrolls in its frame, also by keyboard.
    return (
        f'<div class="panel table-wrap" tabindex="0" role="region" aria-label="Table {number}">'
        "<table>\n"
    )


def _close_table(
    renderer: RendererHTML, tokens: Tokens, i: int, options: OptionsDict, env: EnvType
) -> str:
    return "</table></div>\n"


def _code(
    renderer: RendererHTML, tokens: Tokens, i: int, options: OptionsDict, env: EnvType
) -> str:
    """A block to copy. A drawing in Mermaid's language is shown as it is written."""
    token = tokens[i]
    text = f'<pre id="code-{i}" tabindex="0">{escape(token.content)}</pre>'
    is_drawing = token.info.split()[:1] == ["mermaid"]
    copy = f'<button type="button" class="button small" data-copy="code-{i}">Copy</button>'
    return f'<div class="code">{"" if is_drawing else copy}{text}</div>\n'
