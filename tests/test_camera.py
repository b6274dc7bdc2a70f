"""Faces followed and smoothed over frames, and the examples that use a camera, on clips instead of one."""

import re
import sys

import numpy as np
import pytest
from conftest import open_faceless, open_portrait
from PIL import Image
from test_predict import run_python, write_checkpoint
from test_video import FRAMES, SIZE, write_clip

from errors import InputError
from examples import emotion_cam, song_recommend
from faces.camera import Camera, Tracker, watch
from faces.detector import Face
from faces.video import Video
from predict_emotion import load_model

EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
cv2 = pytest.importorskip("cv2", reason="needs OpenCV")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model.pth", names=EMOTIONS)


@pytest.fixture
def run(model_path):
    """Runs an example; returns its output, or its last line on standard error if that is an error of the user's."""

    def run_example(module, *args, **variables):
        code, out, err = run_python("-m", f"examples.{module}", *args, "--checkpoint", model_path, **variables)
        if code == 0:
            return out
        line = err.splitlines()[-1]
        assert code == 2 and "Traceback" not in err and line.startswith("error: "), err
        return line

    return run_example


def face(left, width=50):
    return Face(left, 100, width, width, 1.0)


def prediction(happy):
    return "happy", happy, {"happy": happy, "sad": 100 - happy}


# Tracking


def test_probabilities_are_smoothed_per_face():
    tracker = Tracker(smooth=0.75)
    tracker.detect([face(0), face(300)])
    tracker.classify([prediction(100.0), prediction(0.0)])
    tracker.detect([face(305), face(4)])  # moved, and in another order
    tracker.classify([prediction(0.0), prediction(100.0)])
    assert [track.face.left for track in tracker.tracks] == [4, 305]
    assert [track.probs["happy"] for track in tracker.tracks] == [75.0, 25.0]
    assert tracker.tracks[1].prediction == ("sad", 75.0, {"happy": 25.0, "sad": 75.0})
    tracker.smooth = 0.0
    tracker.classify([prediction(20.0), prediction(30.0)])
    assert [track.probs["happy"] for track in tracker.tracks] == [20.0, 30.0]


def test_a_face_that_is_missed_stays_for_a_while():
    tracker = Tracker(patience=2)
    tracker.detect([face(0)])
    tracker.classify([prediction(80.0)])
    tracker.detect([])
    assert len(tracker.tracks) == 1 and tracker.found == []
    tracker.detect([face(3)])  # found again before it is given up
    tracker.detect([])
    tracker.detect([])
    assert tracker.tracks == []


def test_a_jump_is_another_face():
    tracker = Tracker(patience=5)
    tracker.detect([face(0)])
    tracker.classify([prediction(80.0)])
    tracker.detect([face(200)])
    assert [(track.face.left, track.probs is None) for track in tracker.tracks] == [(0, False), (200, True)]


def test_watch_follows_the_face_of_a_clip(model_path, tmp_path):
    model, names = load_model(model_path, "cpu")
    frames = [pixels for _, _, pixels in Video(write_clip(tmp_path / "clip.mp4"))]
    seen = list(watch(model, names, frames, detect_every=3))
    assert all(np.array_equal(pixels, frame) for (pixels, _), frame in zip(seen, frames, strict=True))
    assert all(len(results) == 1 for _, results in seen)
    lefts = [results[0][0].left for _, results in seen]
    assert lefts[0] == lefts[1] == lefts[2] and lefts[-1] > lefts[0] + 10
    assert all(abs(sum(results[0][1][2].values()) - 100) < 0.01 for _, results in seen)


def test_frames_are_dropped_rather_than_queued(tmp_path):
    with Camera(str(write_clip(tmp_path / "clip.mp4", frames=24)), timeout=60) as camera:
        frames = iter(camera)
        next(frames)
        camera._thread.join()  # the clip has played to its end, and nobody has asked for a frame
        assert len(list(frames)) <= 1


def test_a_camera_that_stops_is_one_line(tmp_path):
    with Camera(str(write_clip(tmp_path / "clip.mp4", frames=2))) as camera:
        camera.is_camera = True  # a clip's end is what an unplugged camera looks like
        with pytest.raises(InputError, match="stopped sending images"):
            for _ in camera:
                pass


# The camera example


def test_headless_writes_every_frame(run, tmp_path):
    clip, out = write_clip(tmp_path / "clip.mp4"), tmp_path / "out.mp4"
    printed = run("emotion_cam", "--source", clip, "--headless", out, "--min-face", 40)
    assert f"{FRAMES} frames, 100% with a face" in printed
    copy = Video(out)
    assert (copy.count, copy.size) == (FRAMES, SIZE)
    changed = [np.abs(a[2].astype(int) - b[2]).max(2) > 60 for a, b in zip(copy, Video(clip), strict=True)]
    assert all(frame.mean() > 0.01 for frame in changed)


MISTAKES = """--source 77, --source nowhere.mp4, --source README.md, --smooth 1, --detect-every 0, --min-face 0,
--headless out.avi, --headless nowhere/out.mp4, --seconds 0, --seconds nan"""


@pytest.mark.parametrize("words", MISTAKES.replace("\n", " ").split(", "))
def test_camera_mistakes_are_one_line(run, tmp_path, words):
    target = () if "--headless" in words else ("--headless", tmp_path / "out.mp4")
    assert words.split()[1] in run("emotion_cam", *words.split(), *target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is always a display")
def test_no_display_is_one_line(run, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    line = run("emotion_cam", "--source", clip, DISPLAY=None, WAYLAND_DISPLAY=None, QT_QPA_PLATFORM=None)
    assert "display" in line and "--headless" in line


@pytest.mark.skipif(not re.search(r"GUI: +NONE", cv2.getBuildInformation()), reason="this OpenCV has windows")
def test_no_window_is_one_line(run, tmp_path):
    line = run("emotion_cam", "--source", write_clip(tmp_path / "clip.mp4"), DISPLAY=":0")
    assert "--headless" in line and "opencv-python" in line


def test_the_source_is_never_written_over(run, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    before = clip.read_bytes()
    line = run("emotion_cam", "--source", clip, "--headless", tmp_path / "." / "clip.mp4")
    assert "the source itself" in line and clip.read_bytes() == before


def test_a_recording_plays_at_the_speed_of_life(tmp_path, monkeypatch):
    recording = emotion_cam.Recording(tmp_path / "out.mp4", 10.0, by_clock=True)
    for seconds in (0.0, 0.05, 0.5, 1.0):
        monkeypatch.setattr(emotion_cam.time, "perf_counter", lambda seconds=seconds: recording.start + seconds)
        recording.add(Image.new("RGB", (64, 48)), has_face=True)
    recording.close()
    assert Video(tmp_path / "out.mp4").count == 11 and recording.frames == 4


def test_rate_counts_frames_per_second(monkeypatch):
    rate = emotion_cam.Rate()
    for now in (10.0, 10.5):
        monkeypatch.setattr(emotion_cam.time, "perf_counter", lambda now=now: now)
        result = rate.tick()
    assert result == pytest.approx(2)


# Songs


SONGS_FOR = ["photo youtube", "photo spotify", "photo web", "crop web", "clip web"]


@pytest.mark.parametrize(("kind", "service"), [*map(str.split, SONGS_FOR)], ids=SONGS_FOR)
def test_a_song_for_an_image_or_a_clip(run, tmp_path, kind, service):
    source = write_clip(tmp_path / "clip.mp4") if kind == "clip" else tmp_path / f"{kind}.png"
    if kind == "photo":
        open_portrait().save(source)
    elif kind == "crop":
        open_portrait().crop((176, 65, 274, 163)).resize((48, 48)).save(source)
    printed = run("song_recommend", "--source", source, "--service", service, "--no-browser")
    line, address = printed.splitlines()[-2:]
    songs = song_recommend.read_songs(song_recommend.SONGS, EMOTIONS)
    assert line.partition("A song for that: ")[2] in songs[line.split()[2]]
    assert address.startswith(song_recommend.SERVICES[service].partition("{")[0]) and " " not in address
    assert "stay on this machine" in printed


def test_the_browser_is_asked_for_the_song_alone(model_path, tmp_path, monkeypatch, capsys):
    open_portrait().save(tmp_path / "photo.png")
    opened = []
    monkeypatch.setattr(song_recommend.webbrowser, "open", lambda address: opened.append(address) or False)
    song_recommend.main(["--source", str(tmp_path / "photo.png"), "--checkpoint", str(model_path)])
    out = capsys.readouterr().out
    assert len(opened) == 1 and opened[0] in out and "no browser could be opened" in out


def test_the_dominant_emotion_is_that_of_the_largest_face_over_time():
    small, large = (face(0, 20), prediction(100.0)), (face(100, 90), prediction(10.0))
    seen = [(None, [small, large]), (None, []), (None, [(face(100, 90), prediction(30.0))])]
    assert song_recommend.dominant_emotion(seen, ["happy", "sad"]) == ("sad", 80.0)
    with pytest.raises(InputError, match="no face"):
        song_recommend.dominant_emotion([(None, [])], ["happy", "sad"])


WRONG_SONGS = {
    b"happy = [": "TOML",
    b"\xff\xfe": "TOML",
    b'happy = "one"': "happy must be a list",
    b"happy = [1]": "happy must be a list",
    b'happy = [" "]': "happy must be a list",
    b'happy = ["a - b"]': "no song for angry, disgust, fear, neutral, sad, surprise",
}


@pytest.mark.parametrize(("content", "message"), WRONG_SONGS.items())
def test_song_lists_are_checked(tmp_path, content, message):
    (tmp_path / "songs.toml").write_bytes(content)
    with pytest.raises(InputError, match=rf"songs\.toml.*{message}[^\n]*$"):
        song_recommend.read_songs(tmp_path / "songs.toml", EMOTIONS)


@pytest.mark.parametrize("words", ["--source nowhere.jpg", "--source 77", "--songs nowhere.toml", "--seconds 0"])
def test_song_mistakes_are_one_line(run, words):
    assert words.split()[1] in run("song_recommend", *words.split())


def test_an_image_without_a_face_has_no_song(run, tmp_path):
    open_faceless().save(tmp_path / "arms.png")
    assert "no face" in run("song_recommend", "--source", tmp_path / "arms.png")
