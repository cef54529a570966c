"""The main job in a real browser against a whole box: set up, upload, watch the build, call the
endpoint with the copied snippet, see what it cost."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, expect

from tests.app.console.conftest import Box

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BUILD_TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def pt2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier with a dynamic batch axis."""
    layers = [torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)]
    program = torch.export.export(
        torch.nn.Sequential(*layers).eval(),
        (torch.zeros(4, 1, 8, 8),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
    )
    path = tmp_path_factory.mktemp("model") / "Tiny Digits.pt2"
    torch.export.save(program, path)
    return path


def test_a_stranger_gets_from_the_link_to_a_billed_call(
    box: Box, owner: Page, pt2_path: Path
) -> None:
    page = owner
    expect(page.get_by_role("heading", name="No models yet")).to_be_visible()

    page.get_by_role("link", name="Upload a model").click()
    page.get_by_label("choose one").set_input_files(pt2_path)
    expect(page.get_by_label("Name", exact=True)).to_have_value("tiny-digits")
    page.get_by_role("button", name="Upload and build").click()

    # The page follows the build by itself until callers are answered.
    page.wait_for_url("**/console/models/tiny-digits/versions/1")
    expect(page.locator("[sse-swap=status] .lamp")).to_have_text("ready", timeout=BUILD_TIMEOUT_MS)
    expect(page.locator("[sse-swap=proof]")).to_contain_text("proven equal")
    expect(page.locator("[sse-swap=program]")).to_contain_text("float32")
    draw_a_digit(page)
    page.go_back()
    page.locator("#snippet-1").get_by_role("button", name="Copy").click()
    expect(page.locator("#snippet-1").get_by_role("button")).to_have_text("Copied")
    snippet = page.evaluate("navigator.clipboard.readText()")

    page.get_by_role("link", name="Keys", exact=True).first.click()
    page.get_by_label("Name", exact=True).fill("Laptop")
    page.get_by_role("button", name="Create key").click()
    secret = page.get_by_label("The new key").input_value()
    answer = subprocess.run(
        ["bash", "-c", snippet],
        env={"PATH": os.environ["PATH"], "TAPEOUT_API_KEY": secret},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"outputs"' in answer.stdout, answer.stdout

    page.get_by_role("link", name="Usage", exact=True).click()
    row = page.get_by_role("row").filter(has_text="Laptop").filter(has_text="completed")
    for _ in range(20):  # a request is settled in a batch, moments after its answer
        if row.count():
            break
        page.reload()
    expect(row).to_have_count(1)
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_class("mono")
    expect(page.get_by_role("row", name="Total")).to_contain_text("$0.0")

    # Stopping and starting needs no reload, and deleting asks for the name.
    page.goto(f"{box.url}/console/models/tiny-digits")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("[sse-swap=endpoint]")).to_contain_text("stopped", timeout=30_000)
    page.get_by_role("button", name="Start").click()
    expect(page.locator("[sse-swap=status] .lamp")).to_have_text("ready", timeout=60_000)
    page.get_by_role("link", name="Delete").click()
    page.get_by_label("Type the model").fill("tiny-digits")
    page.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_role("heading", name="No models yet")).to_be_visible()

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out.")).to_be_visible()
    page.goto(f"{box.url}/console/usage")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def draw_a_digit(page: Page) -> None:
    """In the playground, with the pen; then numbers instead, and numbers that are none."""
    page.get_by_role("link", name="Try it").click()
    canvas = page.get_by_label("Draw it")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 40, steps=5)
    page.mouse.up()
    answer = page.locator("#result")
    expect(answer).to_contain_text("ms, paid for")
    expect(answer.locator("ol.bars > li")).to_have_count(10)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("its numbers")
