"""Videos as input: rows with times, numbered faces, an annotated copy with sound; clips are made from a portrait."""

import os
import re
import sys
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, interrupt, open_portrait, refusal, run, run_process
from PIL import Image
from test_predict import rows_of
from test_web_demo import CHROMIUM

from examples import emotion_cam
from faces.video import Video, VideoCopy, is_video
from predict_emotion import main

av = pytest.importorskip("av", reason="needs PyAV")
FRAMES, FPS, SIZE = 24, 12, (320, 240)
CLIP = "my \x1b[31m clip" if os.name == "posix" else "my clip"  # a terminal must not obey it
UNEVEN = [0, 0.1, 0.15, 0.5, 0.6, 1.25]


def write_clip(path, frames=FRAMES, empty=(), *, step=1, times=None, sound=None, rotation=0):
    """The portrait, `step` pixels farther to the right in every frame; frames in `empty` show nothing.

    The face has about 90 pixels. `times` of the frames in seconds, at FPS by default; `sound` is the codec of a tone.
    """
    times = times or [number / FPS for number in range(frames)]
    portrait = open_portrait().crop((90, 0, 330, 240))
    with av.open(str(path), "w") as clip:
        video = clip.add_stream("libx264", FPS, width=SIZE[0], height=SIZE[1], time_base=Fraction(1, 9000))
        if rotation and not hasattr(video, "set_display_rotation"):
            pytest.skip("this PyAV can't write how a video is turned")
        if rotation:
            video.set_display_rotation(rotation)
        audio = sound and clip.add_stream(sound, 48_000, layout="mono")
        for number, time in enumerate(times):
            image = Image.new("RGB", SIZE, (90, 110, 130))
            if number not in empty:
                image.paste(portrait, (number * step, 0))
            frame = av.VideoFrame.from_image(image).reformat(format="yuv420p")
            frame.pts, frame.time_base = round(9000 * time), Fraction(1, 9000)
            clip.mux(video.encode(frame))
        clip.mux(video.encode())
        if sound:
            wave = 8000 * np.sin(np.arange(round(48_000 * (times[-1] + 1 / FPS))) / 20)
            tone = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
            tone.sample_rate = 48_000
            clip.mux([*audio.encode(tone), *audio.encode()])
    return path


def read_sound(path):
    """(name of the codec, seconds, packets) of the sound of a file, or None."""
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(audio=0) if packet.size] if file.streams.audio else []
        seconds = sum(float(packet.duration * packet.time_base) for packet in packets)
        return (file.streams.audio[0].codec_context.name, seconds, [*map(bytes, packets)]) if packets else None


@pytest.fixture
def predict(checkpoint):
    return partial(run, main, "--checkpoint", checkpoint)


def test_frames_are_upright_in_rgb_with_their_times(tmp_path):
    assert is_video("a.mp4") and is_video(Path("b.MOV")) and not is_video("c.jpg") and not is_video("mp4")
    clip = Video(write_clip(tmp_path / "clip.mp4"))
    assert (clip.size, clip.fps, clip.count) == (SIZE, FPS, FRAMES)
    numbers, times, frames = zip(*clip, strict=True)
    assert numbers == tuple(range(FRAMES)) and times == pytest.approx([number / FPS for number in numbers])
    assert np.abs(frames[0][-5:, -5:].reshape(-1, 3).mean(0) - (90, 110, 130)).max() < 8 and clip.end == 2
    uneven = Video(write_clip(tmp_path / "uneven.mkv", times=UNEVEN))
    assert [seconds for _, seconds, _ in uneven] == pytest.approx(UNEVEN)
    for turns in (1, 2, 3):
        turned = Video(write_clip(tmp_path / "turned.mp4", frames=1, rotation=90 * turns))
        assert turned.size == SIZE[:: -1 if turns % 2 else 1]
        assert np.abs(next(iter(turned))[2] - np.rot90(frames[0], turns).astype(float)).mean() < 5


def test_rows_have_times_faces_keep_their_numbers_and_shares_are_printed(predict, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", empty=range(8, 16))
    code, out, err = predict(clip, "--every", 4, "--output", tmp_path / "p.csv")
    rows = rows_of(tmp_path / "p.csv")
    assert code == 0 and {row["file"] for row in rows} == {str(clip)}
    assert [float(row["time"]) for row in rows] == pytest.approx([n / FPS for n in range(0, FRAMES, 4)], abs=1e-3)
    assert [row["face"] for row in rows] == ["1", "1", "none", "none", "1", "1"]
    assert [int(rows[n]["left"]) - int(rows[0]["left"]) for n in (1, 5)] == pytest.approx([4, 20], abs=4)
    line = re.fullmatch(rf"{clip}: (\w+ \d+%(?:, \w+ \d+%)*) of 1.3 s with a face\n", out)
    assert sum(map(int, re.findall(r"\d+(?=%)", line[1]))) == pytest.approx(100, abs=1)
    assert err.splitlines()[-1] == "1 video, 4 faces, 2 without a face"
    out = predict(write_clip(clip, frames=3, step=80, empty=[0]))[1]
    assert re.findall("(face [12]|no face found)", out) == ["no face found", "face 1", "face 2"]  # which is elsewhere
    assert "clip.mp4: no face found in 0.2 s" in predict(write_clip(clip, frames=2, empty=[0, 1]))[1]


def test_annotated_copy_and_timeline(predict, tmp_path):
    clip, photo = write_clip(tmp_path / f"{CLIP}.mp4", times=UNEVEN, empty=[2, 3], sound="aac"), tmp_path / "a.png"
    before, folder = clip.read_bytes(), tmp_path / "out"
    open_portrait().save(photo)
    with warnings.catch_warnings(action="error"):
        code, _, err = predict(clip, photo, "--every", 2, "--annotate", folder)
    assert code == 0 and err.splitlines()[-1] == "1 image, 1 video, 3 faces, 1 without a face", err
    assert err.replace("\n", "").isprintable()
    assert {path.name for path in folder.iterdir()} == {f"{CLIP}.faces.mp4", f"{CLIP}.timeline.png", "a.faces.jpg"}
    copy, original = Video(folder / f"{CLIP}.faces.mp4"), Video(clip)
    pairs = list(zip(copy, original, strict=True))
    assert [a[1] for a, _ in pairs] == pytest.approx(UNEVEN) and copy.size == original.size
    changed = [np.abs(a[2].astype(int) - b[2]).max(2) > 60 for a, b in pairs]
    assert all(frame.mean() > 0.005 for frame in changed)  # box and label, or that there is no face
    assert read_sound(folder / f"{CLIP}.faces.mp4") == read_sound(clip) and clip.read_bytes() == before
    with Image.open(folder / f"{CLIP}.timeline.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_a_copy_plays_in_a_browser_with_its_sound(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]).new_page()
        for name, sound in (("a.mp4", "aac"), ("b.mkv", "pcm_s16le"), ("c.avi", None)):
            video = Video(write_clip(tmp_path / name, sound=sound))
            copy = VideoCopy(tmp_path / f"{name}.mp4", video.fps, (321, 241), video)
            for _, seconds, pixels in video:
                copy.add(pixels, seconds)
            copy.close()
            page.goto(copy.path.as_uri())
            page.wait_for_function("document.querySelector('video').readyState == 4")
            play = "await new Promise(end => {v.onended = end; v.play();})"
            state = "[v.error, v.videoWidth, v.duration, v.webkitAudioDecodedByteCount > 0]"
            state = page.locator("video").evaluate(f"async v => {{{play}; return {state};}}")
            assert state == [None, SIZE[0], pytest.approx(FRAMES / FPS, abs=0.1), bool(sound)]
            assert not sound or read_sound(copy.path)[:2] == ("aac", pytest.approx(FRAMES / FPS, abs=0.1))


def test_a_recording_keeps_the_times_and_as_much_of_the_sound(checkpoint, tmp_path):
    clip, target = write_clip(tmp_path / "clip.mp4", times=UNEVEN, sound="aac"), tmp_path / "out.mp4"
    words = ["--source", clip, "--headless", target, "--seconds", 0.55, "--checkpoint", checkpoint]
    code, _, err = run(emotion_cam.main, *words)
    assert code == 0 and [seconds for _, seconds, _ in Video(target)] == pytest.approx(UNEVEN[:4]), err
    assert read_sound(target)[1] == pytest.approx(0.5 + 1 / Video(clip).fps, abs=0.1)


def test_ctrl_c_and_a_full_disk_leave_no_file(checkpoint, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", sound="aac")
    (tmp_path / "p.csv").write_text("earlier")
    words = [clip, "--checkpoint", checkpoint, "--annotate", tmp_path / "out", "--output", tmp_path / "p.csv"]
    interrupt(main, words, "draw_faces", call=5)
    if sys.platform.startswith("linux"):
        assert_refused(main, words, "clip.faces.mp4", "large", run=partial(run_process, ulimit="-f 9"))
    assert list((tmp_path / "out").iterdir()) == [] and (tmp_path / "p.csv").read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "out", "p.csv"}
    assert "nowhere" in refusal(VideoCopy, tmp_path / "nowhere" / "a.mp4", 10, (32, 32))


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42" + bytes(500)])
def test_broken_videos_are_named(predict, tmp_path, content):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    assert f"{broken}: no video" in refusal(Video, broken)
    code, _, err = predict(broken, write_clip(tmp_path / "good.mp4", frames=2))
    assert code == 0 and "broken.mp4" in err and "1 could not be read" in err


def test_a_video_that_is_cut_off_or_missing_and_a_missing_package_are_named(checkpoint, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mkv", times=[number / 2 for number in range(FRAMES)])
    clip.write_bytes(clip.read_bytes()[:-1000])
    code, _, err = run(main, clip, "--every", 4, "--checkpoint", checkpoint)
    assert code == 0 and re.search(r"clip.mkv: \d\.\d of 11\.6 s could be read\n", err), err
    assert "nowhere.mp4: no such file" in refusal(Video, tmp_path / "nowhere.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert_refused(main, [clip, "--checkpoint", checkpoint], "clip.mkv", "pip install av")
