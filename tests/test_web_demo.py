"""The web page in a real browser: the system's Chromium, headless, driven by playwright."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
from conftest import PORTRAIT, assert_refused, draw_image, free_port
from test_predict import REPO, run_python

from examples import web_demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("cv2", reason="needs OpenCV")


def start(folder):
    """A running page, which keeps temporary files in `folder`, and its address."""
    pytest.importorskip("gradio", reason="needs Gradio")
    command = [sys.executable, "-m", "examples.web_demo", "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, cwd=REPO, env={**os.environ, "TMPDIR": str(folder)}, **pipes)
    line = server.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), server.communicate()
    return server, line.split()[1]


def end(server, folder, number):
    """Ends the page by a signal; the images that it was given are deleted then."""
    try:
        assert list(folder.glob("emotion_page_*"))
        server.send_signal(number)
        server.communicate(timeout=300)
        assert not list(folder.glob("emotion_page_*"))
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    server, address = start(folder)
    yield address
    end(server, folder, signal.SIGINT)


@pytest.fixture(scope="module")
def page(address):
    """The page, opened; `page.asked` lists the addresses that it has asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    quiet = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    with playwright.sync_playwright() as driver:
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


def test_prints_which_model_runs(page):
    text = page.get_by_label("Model", exact=True).input_value()
    assert "seresnet13" in text and "emotion_model.pth" in text and "not sent anywhere" in page.inner_text("body")


def test_uploaded_photo_gets_box_and_label_bar(page):
    upload(page, PORTRAIT, "1 face found")
    page.wait_for_selector("text=Face 1")
    label = page.inner_text("[data-testid=label-output-value], .output-class")
    assert label.strip() == "happy"
    bars = page.inner_text("body").split("Face 1")[1]
    assert all(name in bars for name in ("angry", "disgust", "fear", "neutral", "sad", "surprise"))
    drawn = page.locator("img[src*='/file=']").last.evaluate(
        "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
    )
    assert min(drawn) >= 512


def test_image_without_a_face_and_broken_file(page, tmp_path):
    draw_image(1, 300, "RGB").save(tmp_path / "noise.png")
    (tmp_path / "broken.jpg").write_text("this is no image")
    for name, message in (("noise.png", "No face found"), ("broken.jpg", "can't be read")):
        upload(page, tmp_path / name, message)
        page.wait_for_selector("text=Face 1", state="detached")
        upload(page, PORTRAIT, "1 face found")  # and the page goes on


def test_small_images_are_taken_whole(page):
    upload(page, next((REPO / "test" / "happy").iterdir()), "taken for one face")
    page.wait_for_selector("text=Face 1")
    upload(page, PORTRAIT, "1 face found")
    page.locator(".gallery-item").nth(1).click()  # an example, a drawing
    page.wait_for_function("document.querySelector('#message').innerText.includes('taken for one face')")


def test_page_asks_nobody_else(page, address):
    assert len(page.asked) > 10
    assert not [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_images_are_deleted_however_it_ends(tmp_path):
    server, _ = start(tmp_path)
    end(server, tmp_path, signal.SIGTERM)


@pytest.mark.parametrize("port", ["0", "70000", "taken"])
def test_unusable_port(port):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1]) if port == "taken" else port
        assert_refused(web_demo.main, ["--port", port], port)


def test_without_gradio(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")
    run = partial(run_python, PYTHONPATH=str(tmp_path))
    assert_refused("-m", ["examples.web_demo", "--port", free_port()], "pip install", run=run)
