"""Static files and templates: vendored files are what was published, everything loads."""

import hashlib
import re

import pytest

from app.console.templating import (
    STATIC_DIR,
    TEMPLATES_DIR,
    asset,
    environment,
    format_bytes,
    format_message,
    format_seconds,
    format_short,
)
from tests.app.console.conftest import Console

VENDOR = STATIC_DIR / "vendor"
MAX_STYLE_LINES = 800


def test_vendored_files_are_unchanged_and_have_a_licence() -> None:
    listed = dict(
        reversed(line.split(maxsplit=1))  # type: ignore[misc]
        for line in (VENDOR / "SHA256SUMS").read_text().splitlines()
    )
    present = {path.name for path in VENDOR.iterdir()} - {"SHA256SUMS"}
    assert present == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    for script in VENDOR.glob("*.min.js"):
        licence = script.with_name(script.name.replace(".min.js", ".LICENSE.txt"))
        assert "permission" in licence.read_text().lower()


def test_every_template_parses_and_links_static_files_that_exist() -> None:
    templates = sorted(TEMPLATES_DIR.rglob("*.html"))
    assert templates
    for path in templates:
        source, _, _ = environment().loader.get_source(  # type: ignore[union-attr]
            environment(), path.relative_to(TEMPLATES_DIR).as_posix()
        )
        environment().parse(source)
        for name in re.findall(r'asset\("([^"]+)"\)', source):
            assert (STATIC_DIR / name).is_file(), name


def test_the_style_sheet_stays_readable_and_loads_nothing() -> None:
    style = (STATIC_DIR / "console.css").read_text()
    assert style.count("\n") < MAX_STYLE_LINES
    assert "url(" not in style
    assert "@import" not in style


def _luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(scheme: int) -> None:
    style = (STATIC_DIR / "console.css").read_text()
    colours = {
        name: _luminance(values.split(",")[scheme].strip())
        for name, values in re.findall(r"--([a-z-]+): light-dark\(([^)]+)\)", style)
    }
    pairs = [(text, ground) for text in ("ink", "muted", "accent", "bad", "good")
             for ground in ("paper", "panel", "sunken")]  # fmt: skip
    pairs += [("on-accent", "accent"), ("ink", "bad-wash"), ("bad", "bad-wash")]
    for text, ground in pairs:
        bright, dark = sorted((colours[text], colours[ground]), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    for ground in ("paper", "panel"):  # borders of fields
        bright, dark = sorted((colours["line-strong"], colours[ground]), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3, ground


async def test_static_files_are_kept_by_browsers_and_open_to_strangers(console: Console) -> None:
    answer = await console.client.get(asset("console.css"))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/css")
    assert "immutable" in answer.headers["cache-control"]
    assert (await console.client.get("/console/static/../errors.py")).status_code in (303, 404)
    for name in ("%00", "a%00b.css", "x" * 300, "x" * 5000, "x/" * 2000, "%E2%80%AE"):
        assert (await console.client.get(f"/console/static/{name}")).status_code == 404


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (13_650_944, "13.7 MB"), (5 * 10**12, "5 TB")],
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00031, "0.31 ms"),
        (0.43, "430 ms"),
        (2.4, "2.4 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 5 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_counts_are_short() -> None:
    assert [format_short(n) for n in (7, 52_138, 3_412_736)] == ["7", "52.1k", "3.4M"]


def test_code_in_a_message_is_set_apart_and_escaped() -> None:
    html = format_message("Do <this>:\n    a = 1\n      b\nThen that.")
    assert html == "<p>Do &lt;this&gt;:</p><pre>a = 1\n  b</pre><p>Then that.</p>"
