"""Faces followed and smoothed over frames, and the examples that use a camera, on clips instead of one."""

import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused, draw_image, open_portrait, refusal, run
from PIL import Image
from test_predict import NAMES
from test_video import FRAMES, SIZE, write_clip

from examples import emotion_cam, song_recommend
from faces.align import Face
from faces.camera import Camera, load_opencv, watch
from faces.tracking import Tracker
from faces.video import Video
from inference import View
from predict_emotion import load_model

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")


def face(left, width=50):
    return Face(left, 100, width, width, 1.0, ())


def prediction(happy):
    return "happy", happy, {"happy": happy, "sad": 100 - happy}


def test_probabilities_are_smoothed_per_face():
    tracker = Tracker(smooth=0.75)
    tracker.detect([face(0), face(300)])
    tracker.classify([prediction(100.0), prediction(0.0)])
    tracker.detect([face(305), face(4)])  # moved, and in another order
    tracker.classify([prediction(0.0), prediction(100.0)])
    assert [(track.number, track.face.left) for track in tracker.tracks] == [(1, 4), (2, 305)]
    assert [track.probs["happy"] for track in tracker.tracks] == [75.0, 25.0]
    assert tracker.tracks[1].prediction == ("sad", 75.0, {"happy": 25.0, "sad": 75.0})
    tracker.smooth = 0.0
    tracker.classify([prediction(20.0), prediction(30.0)])
    assert [track.probs["happy"] for track in tracker.tracks] == [20.0, 30.0]


def test_a_face_that_is_missed_stays_for_a_while_and_one_that_jumps_is_another():
    tracker = Tracker(patience=2)
    tracker.detect([face(0)])
    tracker.detect([])
    assert len(tracker.tracks) == 1 and tracker.found == []
    tracker.detect([face(3)])  # found again before it is given up
    tracker.detect([])
    tracker.detect([])
    assert tracker.tracks == []
    tracker.detect([face(0)])
    tracker.classify([prediction(80.0)])
    tracker.detect([face(200)])
    assert [(track.number, track.probs is None) for track in tracker.tracks] == [(2, False), (3, True)]


def test_watch_follows_the_face_of_a_clip(checkpoint, tmp_path):
    model, names = load_model(checkpoint, "cpu")
    frames = [pixels for _, _, pixels in Video(write_clip(tmp_path / "clip.mp4"))]
    seen = list(watch(model, names, frames, detect_every=3))
    assert all(np.array_equal(pixels, frame) for (pixels, _), frame in zip(seen, frames, strict=True))
    views, predictions = zip(*(result for _, (result,) in seen), strict=True)
    assert views[0] == views[1] == views[2] and views[-1].face.left > views[0].face.left + 10
    assert {(view.kind, view.number) for view in views} == {("face", 1)}
    assert all(abs(sum(probs.values()) - 100) < 0.01 for _, _, probs in predictions)


def test_a_file_plays_at_its_speed_from_its_first_frame_on_and_frames_are_dropped_rather_than_queued(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", times=[0, 0.05, 0.1, 0.6])
    with Camera(str(clip), timeout=60) as camera:
        start, frames = time.monotonic(), iter(camera)
        assert np.array_equal(next(frames), next(iter(Video(clip)))[2])
        camera._thread.join()  # the clip has played to its end, and nobody has asked for a frame
        assert time.monotonic() - start >= 0.6 and len(list(frames)) == 1


def test_a_camera_that_stops_is_one_line(monkeypatch):
    reads = iter([True] * 2 + [False] * 4 + [True] + [False] * 5)  # four lost in a row are no end
    frame, seen, released = np.full((48, 64, 3), (255, 0, 0), np.uint8), [], []
    methods = {"isOpened": lambda: True, "read": lambda: (next(reads), frame), "release": lambda: released.append(1)}
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: SimpleNamespace(**methods))
    with Camera("3") as camera:
        assert "camera 3 has stopped sending images" in refusal(lambda: seen.extend(camera))
    assert list(reads) == [] and released == [1]
    assert seen and all((pixels == (0, 0, 255)).all() for pixels in seen)


@pytest.fixture(params=[None, ModuleType("cv2")], ids=["missing", "uninstalled"])  # which leaves an empty folder
def without_opencv(request, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", request.param)
    load_opencv.cache_clear()


def test_a_camera_without_opencv_names_what_to_install(without_opencv, checkpoint, tmp_path):
    words = ["--headless", tmp_path / "out.mp4", "--checkpoint", checkpoint]
    assert_refused(emotion_cam.main, words, "need OpenCV: pip install opencv-python")


def test_headless_writes_every_frame(without_opencv, checkpoint, tmp_path):
    clip, target = write_clip(tmp_path / "clip.mp4"), tmp_path / "out.mp4"
    words = ["--source", clip, "--headless", target, "--min-face", 40, "--checkpoint", checkpoint]
    code, out, err = run(emotion_cam.main, *words)
    assert code == 0 and f"{FRAMES} frames, 100% with a face" in out, err
    copy = Video(target)
    assert (copy.count, copy.size) == (FRAMES, SIZE)
    changed = [np.abs(a[2].astype(int) - b[2]).max(2) > 60 for a, b in zip(copy, Video(clip), strict=True)]
    assert all(frame.mean() > 0.01 for frame in changed)


MISTAKES = """--source 77, --source nowhere.mp4, --source notes.md, --smooth 1, --detect-every 0, --min-face 0,
--headless out.avi, --headless nowhere/out.mp4, --headless ./clip.mp4, --seconds 0, --seconds nan"""


@pytest.mark.parametrize("words", [*map(str.split, MISTAKES.split(","))], ids=" ".join)
def test_camera_mistakes_are_one_line(checkpoint, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("no video")
    before = write_clip(tmp_path / "clip.mp4", frames=2).read_bytes()
    words = ["--source", "clip.mp4", "--headless", "out.mp4", *words, "--checkpoint", checkpoint]
    assert_refused(emotion_cam.main, words, Path(words[-3]))
    assert sorted(os.listdir()) == ["clip.mp4", "notes.md"] and Path("clip.mp4").read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is always a display")
def test_no_display_and_no_window_are_one_line(checkpoint, tmp_path, monkeypatch):
    words = ["--source", write_clip(tmp_path / "clip.mp4", frames=2), "--checkpoint", checkpoint]
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(emotion_cam.main, words, "display", "--headless")
    if re.search(r"GUI: +NONE", cv2.getBuildInformation()):  # other builds of OpenCV have windows
        monkeypatch.setenv("DISPLAY", ":0")
        assert_refused(emotion_cam.main, words, "--headless", "opencv-python")


def test_a_recording_plays_at_the_speed_of_life_and_frames_are_counted(tmp_path, monkeypatch):
    recording, rate = emotion_cam.Recording(tmp_path / "out.mp4", 10.0, by_clock=True), emotion_cam.Rate()
    for seconds in (0.0, 0.05, 0.5, 1.0):
        monkeypatch.setattr(emotion_cam.time, "perf_counter", lambda seconds=seconds: recording.start + seconds)
        recording.add(Image.new("RGB", (64, 48)), has_face=True)
        frames_per_second = rate.tick()
    recording.close()
    assert Video(tmp_path / "out.mp4").count == 11 and recording.frames == 4
    assert frames_per_second == pytest.approx(3)


@pytest.mark.parametrize(("kind", "service"), [("photo", "youtube"), ("crop", "spotify"), ("clip", "web")])
def test_a_song_for_an_image_or_a_clip(checkpoint, tmp_path, monkeypatch, kind, service):
    source = tmp_path / ("clip.mp4" if kind == "clip" else "image.png")
    images = {"photo": open_portrait(), "crop": draw_image(3)}
    images[kind].save(source) if kind in images else write_clip(source, frames=4)
    opened = []
    monkeypatch.setattr(song_recommend.webbrowser, "open", lambda address: opened.append(address) or False)
    words = ["--source", source, "--service", service, "--checkpoint", checkpoint]
    code, out, err = run(song_recommend.main, *words)
    privacy, line, address, note = out.splitlines()
    songs = song_recommend.read_songs(song_recommend.SONGS, NAMES)
    assert code == 0 and line.partition("A song for that: ")[2] in songs[line.split()[2]], err
    assert address.startswith(song_recommend.SERVICES[service].partition("{")[0]) and " " not in address
    assert "stay on this machine" in privacy and opened == [address] and "no browser could be opened" in note
    assert run(song_recommend.main, *words, "--no-browser")[1].count("\n") == 3 and len(opened) == 1


def test_the_dominant_emotion_is_that_of_the_largest_face_over_time():
    small, large = View(None, "face", 1, face(0, 20)), View(None, "face", 2, face(100, 90))
    both = [(small, prediction(100.0)), (large, prediction(10.0))]
    seen = [(None, both), (None, []), (None, [(large, prediction(30.0))])]
    assert song_recommend.dominant_emotion(seen, ["happy", "sad"]) == ("sad", 80.0)
    assert "no face" in refusal(song_recommend.dominant_emotion, [(None, [])], ["happy", "sad"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"happy = [", "TOML"),
        (b"\xff\xfe", "TOML"),
        (b'happy = "one"', "happy must be a list"),
        (b'happy = [" "]', "happy must be a list"),
        (b'happy = ["a - b"]', "no song for angry, sad"),
    ],
)
def test_song_lists_are_checked(tmp_path, content, message):
    (tmp_path / "songs.toml").write_bytes(content)
    assert message in refusal(song_recommend.read_songs, tmp_path / "songs.toml", NAMES)


@pytest.mark.parametrize("words", ["--source nowhere.jpg", "--source 77", "--songs nowhere.toml", "--seconds 0"])
def test_song_mistakes_are_one_line(checkpoint, words):
    assert_refused(song_recommend.main, [*words.split(), "--checkpoint", checkpoint], words.split()[1])
