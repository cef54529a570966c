"""The upload page in a real browser: its tus client, its tar, and life without JavaScript."""

import base64
import io
import tarfile
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.app.console.conftest import EMAIL, PASSWORD, Box

pytestmark = pytest.mark.browser


@pytest.fixture
def large_path(tmp_path: Path) -> Path:
    """48 MB that the box can never serve, in three slices."""
    path = tmp_path / "Weights.bin"
    path.write_bytes(bytes(range(256)) * (48 * 1024 * 4))
    return path


def test_an_upload_that_was_stopped_goes_on_after_a_reload(
    box: Box, owner: Page, large_path: Path
) -> None:
    slow = owner.context.new_cdp_session(owner)
    slow.send("Network.enable")
    speed = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 8e6}
    slow.send("Network.emulateNetworkConditions", speed)
    owner.goto(f"{box.url}/console/upload?name=weights")
    owner.get_by_label("choose one").set_input_files(large_path)
    owner.get_by_role("button", name="Upload and build").click()
    line = owner.locator("[data-line]")
    expect(line).to_contain_text("left", timeout=20_000)
    assert "/s" in (line.text_content() or "")
    # Once the first slice is there, stopping keeps it.
    bar = owner.locator("[data-bar]")
    while bar.evaluate("bar => bar.value") < 0.4:
        owner.wait_for_timeout(50)
    owner.get_by_role("button", name="Stop", exact=True).click()
    expect(line).to_contain_text("Stopped")

    offsets: list[int] = []
    owner.on(
        "request",
        lambda request: (
            offsets.append(int(request.headers["upload-offset"]))
            if request.method == "PATCH"
            else None
        ),
    )
    speed["uploadThroughput"] = -1
    slow.send("Network.emulateNetworkConditions", speed)
    owner.reload()
    owner.get_by_label("choose one").set_input_files(large_path)
    expect(owner.get_by_text("goes on from there")).to_be_visible()
    owner.get_by_role("button", name="Upload and build").click()
    # It is refused in the end, with what to do, and nothing of it has travelled twice.
    expect(owner.locator("[data-alert]")).to_contain_text("not recognised", timeout=30_000)
    expect(owner.locator("[data-alert] pre")).to_contain_text("torch.export.save")
    assert offsets[0] >= 16 * 1024**2, offsets


def test_a_bad_name_is_refused_before_the_file_travels(
    box: Box, owner: Page, large_path: Path
) -> None:
    owner.goto(f"{box.url}/console/upload")
    owner.get_by_label("choose one").set_input_files(large_path)
    owner.get_by_label("Name", exact=True).fill("default")
    with owner.expect_response("**/console/uploads") as answer:
        owner.get_by_role("button", name="Upload and build").click()
    assert answer.value.status == 400
    expect(owner.locator("[data-alert]")).to_contain_text("reserved")


def test_a_folder_becomes_a_tar_that_others_can_read(box: Box, owner: Page) -> None:
    owner.goto(f"{box.url}/console/upload")
    long_name = "deep/" * 20 + "tensor.bin"
    encoded = owner.evaluate(
        """async ([longName]) => {
            const blob = packed([
                ["llama/config.json", new File(['{"a": 1}'], "config.json")],
                ["llama/.git/HEAD", new File(["secret"], "HEAD")],
                [`llama/${longName}`, new File([new Uint8Array(1500).fill(7)], "tensor.bin")],
                ["llama/empty.txt", new File([], "empty.txt")],
            ]);
            const bytes = new Uint8Array(await blob.arrayBuffer());
            return [blob.name, btoa(String.fromCharCode(...bytes))];
        }""",
        [long_name],
    )
    assert encoded[0] == "llama.tar"
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(encoded[1]))) as archive:
        contents = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
    assert contents == {"config.json": b'{"a": 1}', long_name: b"\x07" * 1500, "empty.txt": b""}


def test_without_javascript_the_form_uploads_and_explains(
    box: Box, owner: Page, browser: Browser, tmp_path: Path
) -> None:
    owner.close()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{box.url}/console/upload?name=from-the-form")
        page.get_by_label("E-mail").fill(EMAIL)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/console/upload?name=from-the-form")
        expect(page.get_by_role("button", name="Copy").first).to_be_hidden()
        page.get_by_label("choose one").set_input_files(path)
        page.get_by_role("button", name="Upload and build").click()
        expect(page.get_by_role("alert").filter(has_text="GGUF")).to_be_visible()
        expect(page.get_by_label("Name", exact=True)).to_have_value("from-the-form")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_page_is_wider_than_its_window(box: Box, owner: Page, width: int) -> None:
    owner.set_viewport_size({"width": width, "height": 800})
    for path in ("models", "upload", "keys", "usage"):
        owner.goto(f"{box.url}/console/{path}")
        overflow = owner.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, path


def test_the_keyboard_reaches_the_content_first_and_shows_where_it_is(
    box: Box, owner: Page
) -> None:
    owner.goto(f"{box.url}/console/keys")
    owner.keyboard.press("Tab")
    skip = owner.get_by_role("link", name="Skip to content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    owner.keyboard.press("Tab")
    outline = owner.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_chosen_folder_and_a_dropped_file_are_sent(box: Box, owner: Page, tmp_path: Path) -> None:
    folder = tmp_path / "My Llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    owner.goto(f"{box.url}/console/upload")
    owner.get_by_label("Choose a folder").set_input_files(folder)
    expect(owner.locator("[data-chosen]")).to_contain_text("My Llama.tar")
    expect(owner.get_by_label("Name", exact=True)).to_have_value("my-llama")
    owner.get_by_role("button", name="Upload and build").click()
    expect(owner.locator("[data-alert]")).to_contain_text("safetensors")

    transfer = owner.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["GGUF and more"], "model.gguf"));
            return transfer;
        }"""
    )
    owner.dispatch_event("[data-drop]", "drop", {"dataTransfer": transfer})
    expect(owner.locator("[data-chosen]")).to_contain_text("model.gguf")
    owner.get_by_role("button", name="Upload and build").click()
    expect(owner.locator("[data-alert]")).to_contain_text("GGUF")
