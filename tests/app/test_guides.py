"""The guides hold: every block that is marked as to be run works on a real box, and every link and
anchor in them and in the README leads somewhere."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.run_blocks import blocks
from tests.app.test_box import Box
from tests.runtime.importing.programs import export_digits
from tests.runtime.peer import make_decoder_artifact

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
RUNNABLE = [path for path in GUIDES if blocks(path.read_text())]
NEEDED = [name for name in ("bash", "curl", "openssl") if shutil.which(name) is None]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """With the two models that the guides call."""
    directory = tmp_path_factory.mktemp("box")
    database_url = f"sqlite:///{directory / 'data' / 'tapeout.db'}"  # where a box has it by itself
    box = Box(directory / "data", database_url, TAPEOUT_OPTIMISE="1")
    try:
        llama = make_decoder_artifact(directory / "pydoc-llama")
        for name in ("program.json", "receipt.json"):
            (llama / name).unlink()
        for path in (llama, export_digits(directory / "digits.pt2")):
            pushed = box.tapeout("push", path, "--name", path.stem)
            assert pushed.returncode == 0, pushed.stderr
        box.tapeout("optimise", "digits", "--cancel")  # the guides look for forms of their own
        yield box
    finally:
        box.close()


def test_guides_of_each_reader_can_be_run() -> None:
    names = {path.stem for path in RUNNABLE}
    assert {f"quickstart-{reader}" for reader in ("caller", "owner", "operator")} <= names
    assert "api-chat" in names


@pytest.mark.slow
@pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize("guide", RUNNABLE, ids=lambda path: path.stem)
def test_what_a_guide_says_to_run_works(box: Box, guide: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TAPEOUT_")
    } | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TAPEOUT_URL": box.url,
        "TAPEOUT_API_KEY": str(box.openai.api_key),
        "TAPEOUT_DATA_DIR": str(box.data_dir),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.app.run_blocks", guide],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout


def anchors(path: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    found: list[str] = []
    for heading in HEADING.findall(FENCE.sub("", path.read_text())):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{words}(-\d+)?", other) is not None for other in found)
        found.append(f"{words}-{number}" if number else words)
    return set(found)


@pytest.mark.parametrize("document", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in LINK.findall(FENCE.sub("", document.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        # The box itself serves the guides, and nothing beside them.
        assert document.parent == ROOT or linked.parent == ROOT / "docs", target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_names_every_guide() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in GUIDES:
        assert f"(docs/{path.name})" in readme, path.name
