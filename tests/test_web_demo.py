"""The web page in a real browser: the system's Chromium, headless, driven by playwright."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PORTRAIT, draw_picture, free_port

from console import run_script
from examples import web_demo

REPO = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("cv2", reason="needs OpenCV")


def start(*args, **options):
    command = [sys.executable, "-m", "examples.web_demo", *map(str, args)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """That of a running page, whose folder for temporary files must be empty again once Ctrl-C has ended it."""
    pytest.importorskip("gradio", reason="needs Gradio")
    folder = tmp_path_factory.mktemp("temporary")
    server = start("--port", free_port(), env={**os.environ, "TMPDIR": str(folder)})
    try:
        line = server.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), server.communicate()
        yield line.split()[1]
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=300)
        assert not list(folder.glob("emotion_page_*"))
    finally:
        server.kill()


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
    """Uploads the file in the place of the one before, and waits for `message`."""
    if page.get_by_label("Remove Image").count() or page.get_by_label("Clear").count():
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.wait_for_function("!document.querySelector('#message').innerText.trim()")
    page.set_input_files("input[type=file]", path)
    page.wait_for_function("text => document.querySelector('#message').innerText.includes(text)", arg=message)


def test_says_which_network_runs(page):
    text = page.get_by_label("Network").input_value()
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


def test_picture_without_a_face(page, tmp_path):
    draw_picture(1, 300, "RGB").save(tmp_path / "noise.png")
    upload(page, tmp_path / "noise.png", "No face found")
    page.wait_for_selector("text=Face 1", state="detached")


def test_small_picture_is_taken_whole(page):
    upload(page, next((REPO / "test" / "happy").iterdir()), "taken for one face")
    page.wait_for_selector("text=Face 1")


def test_broken_file(page, tmp_path):
    (tmp_path / "broken.jpg").write_text("this is no picture")
    upload(page, tmp_path / "broken.jpg", "can't be read")
    page.wait_for_selector("text=Face 1", state="detached")
    upload(page, PORTRAIT, "1 face found")  # and the page goes on


def test_example_picture(page):
    page.locator(".gallery-item").nth(1).click()  # a drawing; the page shows the portrait already
    page.wait_for_function("document.querySelector('#message').innerText.includes('taken for one face')")
    page.wait_for_selector("text=Face 1")


def test_page_asks_nobody_else(page, address):
    assert len(page.asked) > 10
    assert not [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_pictures_are_deleted_however_it_ends(tmp_path):
    pytest.importorskip("gradio", reason="needs Gradio")
    server = start("--port", free_port(), env={**os.environ, "TMPDIR": str(tmp_path)})
    assert server.stdout.readline().startswith("open ") and list(tmp_path.glob("emotion_page_*"))
    server.terminate()
    server.communicate(timeout=300)
    assert not list(tmp_path.glob("emotion_page_*"))


@pytest.mark.parametrize("port", ["0", "70000", "taken"])
def test_unusable_port(port, capsys):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1]) if port == "taken" else port
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: web_demo.main(["--port", port]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and port in err


def test_without_gradio(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = start("--port", free_port(), env=environment)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.count("\n") == 1 and "pip install" in err
