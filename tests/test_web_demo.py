"""The web page in a real browser: the system's Chromium, headless, driven by playwright."""

import contextlib
import os
import shutil
import signal
import socket
import sys

import pytest
from conftest import PORTRAIT, REPO, assert_refused, draw_image, free_port, start

from examples import web_demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def serve(folder, number):
    """The address of a page that keeps temporary files in `folder`, and deletes them when signal `number` ends it."""
    pytest.importorskip("gradio", reason="needs Gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        patch.setenv("TMPDIR", str(folder))
        server = start(web_demo.main, "--port", free_port())
    try:
        line = server.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), server.communicate()
        yield line.split()[1]
        assert list(folder.glob("emotion_page_*"))
        server.send_signal(number)
        server.communicate(timeout=300)
        assert not list(folder.glob("emotion_page_*"))
    finally:
        server.kill()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, opened; `page.asked` lists the addresses that it has asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    quiet = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    folder = tmp_path_factory.mktemp("temporary")
    with serve(folder, signal.SIGINT) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *quiet], timeout=120_000)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("input[type=file]", state="attached")
        yield page
        browser.close()


def upload(page, path, message):
    """Uploads the file instead of the one before, and waits for `message`."""
    if page.get_by_label("Remove Image").count() or page.get_by_label("Clear").count():
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.wait_for_function("!document.querySelector('#message').innerText.trim()")
    page.set_input_files("input[type=file]", path)
    page.wait_for_function("text => document.querySelector('#message').innerText.includes(text)", arg=message)


def test_uploaded_photo_gets_box_and_label_bar(page):
    text = page.get_by_label("Model", exact=True).input_value()
    assert "seresnet13" in text and "emotion_model.pth" in text and "not sent anywhere" in page.inner_text("body")
    upload(page, PORTRAIT, "1 face found")
    page.wait_for_selector("text=Face 1")
    assert page.inner_text("[data-testid=label-output-value], .output-class").strip() == "happy"
    bars = page.inner_text("body").split("Face 1")[1]
    assert all(name in bars for name in ("angry", "disgust", "fear", "neutral", "sad", "surprise"))
    width = "async image => { await image.decode(); return image.naturalWidth; }"
    assert page.locator("img[src*='/file=']").last.evaluate(width) >= 512


def test_other_images_and_that_nobody_else_is_asked(page, tmp_path):
    draw_image(1, 300, "RGB").save(tmp_path / "noise.png")
    draw_image(1).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_text("this is no image")
    for name, message, state in (
        ("noise.png", "No face found", "detached"),
        ("broken.jpg", "can't be read", "detached"),
        ("small.png", "taken for one face", "attached"),
    ):
        upload(page, tmp_path / name, message)
        page.wait_for_selector("text=Face 1", state=state)
        upload(page, PORTRAIT, "1 face found")  # and the page goes on
    page.locator(".gallery-item").nth(1).click()  # an example, a drawing
    page.wait_for_function("document.querySelector('#message').innerText.includes('taken for one face')")
    assert len(page.asked) > 10
    assert not [url for url in page.asked if not url.startswith((page.url, "data:", "blob:"))]


def test_no_other_file_of_the_server_is_read(page, tmp_path):
    """Though a request names it; what was uploaded may be named."""
    draw_image(1).save(tmp_path / "secret.png")
    upload = page.request.post(
        f"{page.url}gradio_api/upload",
        multipart={
            "files": {"name": "photo.png", "mimeType": "image/png", "buffer": (tmp_path / "secret.png").read_bytes()}
        },
    )
    ask = f"{page.url}gradio_api/call/classify"
    for path, words in ((tmp_path / "secret.png", "be read as an image"), (upload.json()[0], "taken for one face")):
        event = page.request.post(ask, data={"data": [{"path": str(path)}]}).json()["event_id"]
        assert words in page.request.get(f"{ask}/{event}").text()


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_images_are_deleted_however_it_ends(tmp_path):
    with serve(tmp_path, signal.SIGTERM):
        pass


def test_unusable_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (0, 70000, taken.getsockname()[1]):
            assert_refused(web_demo.main, ["--port", port], port)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(web_demo.main, ["--port", free_port()], "pip install")
