"""The upload page in a real browser: its tus client, its tar, and life without JavaScript."""

import base64
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.app.console.conftest import (
    EMAIL,
    PASSWORD,
    Box,
    free_port,
    restarted,
    serving,
)

pytestmark = pytest.mark.browser


@pytest.fixture
def large_path(tmp_path: Path) -> Path:
    """48 MB that the box can never serve, in three slices."""
    path = tmp_path / "Weights.bin"
    path.write_bytes(bytes(range(256)) * (48 * 1024 * 4))
    return path


def slow_down(page: Page, bytes_per_second: float) -> Callable[[float], None]:
    """Limits what the page sends; gives the way to another speed, of which -1 is no limit and 0
    is no network."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")

    def limit(speed: float) -> None:
        conditions = {"offline": speed == 0, "latency": 0, "downloadThroughput": -1}
        session.send("Network.emulateNetworkConditions", conditions | {"uploadThroughput": speed})

    limit(bytes_per_second)
    return limit


def begin(page: Page, box: Box, path: Path, name: str) -> list[int]:
    """Begins to upload; gives the offsets of the pieces, as they are sent."""
    offsets: list[int] = []
    page.on(
        "request",
        lambda request: (
            offsets.append(int(request.headers["upload-offset"]))
            if request.method == "PATCH"
            else None
        ),
    )
    page.goto(f"{box.url}/console/upload?name={name}")
    page.get_by_label("choose one").set_input_files(path)
    page.get_by_role("button", name="Upload and build").click()
    expect(page.locator("[data-line]")).to_contain_text("left", timeout=20_000)
    return offsets


def wait_for_share(page: Page, share: float) -> None:
    bar = page.locator("[data-bar]")
    while bar.evaluate("bar => bar.value") < share:
        page.wait_for_timeout(50)


def test_pause_resume_and_a_reload_lose_nothing(box: Box, owner: Page, large_path: Path) -> None:
    limit = slow_down(owner, 8e6)
    offsets = begin(owner, box, large_path, "weights")
    assert "/s" in (owner.locator("[data-line]").text_content() or "")
    assert "%" in owner.title()
    wait_for_share(owner, 0.4)  # once the first slice is there
    owner.get_by_role("button", name="Pause").click()
    said = owner.locator("[data-said]")
    expect(said).to_contain_text("Paused")
    limit(16e6)
    owner.get_by_role("button", name="Resume").click()
    expect(said).to_contain_text("Uploading")
    wait_for_share(owner, 0.7)
    owner.get_by_role("button", name="Pause").click()
    assert offsets.count(0) == 1
    num_before = len(offsets)

    limit(-1)
    owner.reload()
    unfinished = owner.locator("[data-unfinished]")
    expect(unfinished).to_contain_text("Weights.bin")
    owner.get_by_label("choose one").set_input_files(large_path)
    expect(owner.get_by_text("of this file are here already")).to_be_visible()
    owner.get_by_role("button", name="Upload and build").click()
    # It is refused in the end, with what to do, and nothing of it has travelled twice.
    expect(owner.locator("[data-alert]")).to_contain_text("not recognised", timeout=30_000)
    expect(owner.locator("[data-alert] pre")).to_contain_text("torch.export.save")
    assert offsets[num_before] >= 16 * 1024**2, offsets
    assert offsets == sorted(offsets)
    # What can never be served is not kept.
    owner.reload()
    expect(unfinished).to_have_count(0)


def test_another_file_of_one_name_size_and_time_begins_anew(
    box: Box, owner: Page, tmp_path: Path
) -> None:
    paths = [tmp_path / step / "model.bin" for step in ("step-100", "step-200")]
    for path, fill in zip(paths, (b"A", b"B"), strict=True):
        path.parent.mkdir()
        path.write_bytes(fill * (48 * 1024**2))
        os.utime(path, (315532800, 315532800))
    limit = slow_down(owner, 8e6)
    offsets = begin(owner, box, paths[0], "one")
    wait_for_share(owner, 0.4)  # once the first slice is there
    owner.get_by_role("button", name="Pause").click()
    num_before = len(offsets)
    limit(-1)
    owner.goto(f"{box.url}/console/upload?name=two")
    owner.get_by_label("choose one").set_input_files(paths[1])
    owner.get_by_role("button", name="Upload and build").click()
    expect(owner.locator("[data-alert]")).to_contain_text("not recognised", timeout=30_000)
    assert offsets[num_before] == 0
    owner.get_by_label("choose one").set_input_files(paths[0])
    expect(owner.get_by_text("of this file are here already")).to_be_visible()


@pytest.mark.parametrize("is_secure", [True, False])
def test_what_tells_files_and_folders_apart(box: Box, owner: Page, is_secure: bool) -> None:
    if not is_secure:
        owner.add_init_script("Object.defineProperty(crypto, 'subtle', { value: undefined })")
    owner.goto(f"{box.url}/console/upload")
    keys = owner.evaluate(
        """async () => {
            const file = (at, time) => {
                const bytes = new Uint8Array(4e6);
                if (at !== null) bytes[at] = 1;
                return new File([bytes], "m.bin", { lastModified: time });
            };
            const keyOf = async (chosen) => {
                const transfer = new Transfer(chosen, { owner: "o" });
                await transfer.identify();
                return transfer.key;
            };
            const folder = (...files) => packed(files.map((file, at) => [`f/${at}.bin`, file]));
            const of = async (...files) => [await keyOf(files[0]), await keyOf(folder(...files))];
            return [
                await of(file(null, 1), file(null, 5)), await of(file(null, 1), file(null, 5)),
                await of(file(0, 1), file(null, 5)), await of(file(2e6, 1), file(null, 5)),
                await of(file(3999999, 1), file(null, 5)), await of(file(null, 2), file(null, 5)),
            ];
        }"""
    )
    assert keys[0] == keys[1]
    for column in zip(*keys[1:], strict=True):
        assert len(set(column)) == len(column)


def test_cancel_keeps_nothing(box: Box, owner: Page, large_path: Path) -> None:
    slow_down(owner, 8e6)
    offsets = begin(owner, box, large_path, "weights")
    wait_for_share(owner, 0.1)
    with owner.expect_response(lambda answer: answer.request.method == "DELETE") as answer:
        owner.get_by_role("button", name="Cancel").click()
    assert answer.value.status == 204
    expect(owner.locator("[data-said]")).to_contain_text("Cancelled")
    num_before = len(offsets)
    owner.get_by_role("button", name="Upload and build").click()
    expect(owner.locator("[data-line]")).to_contain_text("left", timeout=20_000)
    assert offsets[num_before] == 0
    owner.get_by_role("button", name="Cancel").click()


def test_a_cut_waits_and_goes_on(box: Box, owner: Page, large_path: Path) -> None:
    limit = slow_down(owner, 12e6)
    offsets = begin(owner, box, large_path, "weights")
    wait_for_share(owner, 0.4)
    limit(0)
    expect(owner.locator("[data-said]")).to_contain_text("The connection was cut")
    limit(-1)
    expect(owner.locator("[data-alert]")).to_contain_text("not recognised", timeout=30_000)
    assert offsets.count(0) == 1


def test_the_box_restarts_meanwhile(tmp_path: Path, browser: Browser, large_path: Path) -> None:
    port = free_port()
    (tmp_path / "box").mkdir()
    with serving(tmp_path / "box", port) as box:
        context = browser.new_context()
        page = context.new_page()
        page.goto(box.setup_url)
        page.get_by_label("E-mail").fill(EMAIL)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button").last.click()
        page.wait_for_url("**/console/overview")
        limit = slow_down(page, 12e6)
        offsets = begin(page, box, large_path, "weights")
        wait_for_share(page, 0.4)
    expect(page.locator("[data-said]")).to_contain_text("The connection was cut")
    limit(-1)
    with restarted(tmp_path / "box", port):
        expect(page.locator("[data-alert]")).to_contain_text("not recognised", timeout=60_000)
    assert offsets.count(0) == 1
    context.close()


def test_an_unfinished_upload_is_discarded_by_a_form(
    box: Box, owner: Page, large_path: Path
) -> None:
    slow_down(owner, 8e6)
    begin(owner, box, large_path, "weights")
    owner.get_by_role("button", name="Pause").click()
    owner.reload()
    discard = owner.locator("[data-unfinished]").get_by_role("button", name="Discard")
    num_before = discard.count()
    discard.first.click()
    expect(discard).to_have_count(num_before - 1)
    owner.get_by_label("choose one").set_input_files(large_path)
    owner.wait_for_timeout(300)
    expect(owner.get_by_text("here already")).to_be_hidden()


def test_several_files_travel_as_one(box: Box, owner: Page, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    owner.goto(f"{box.url}/console/upload?name=several")
    files = [tmp_path / "config.json", tmp_path / "model.safetensors"]
    owner.get_by_label("choose one").set_input_files(files)
    expect(owner.locator("[data-chosen]")).to_contain_text("several.tar")
    owner.get_by_role("button", name="Upload and build").click()
    expect(owner.locator("[data-alert]")).to_contain_text("safetensors")


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
