"""Videos as input: rows with time stamps, an annotated copy, a timeline; clips are built from a portrait."""

from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, interrupt, open_portrait
from PIL import Image
from test_faces import run_without_opencv
from test_predict import MAIN, rows_of, run_main, write_checkpoint

from errors import InputError
from faces.video import Video, VideoCopy, is_video

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
FRAMES, FPS, SIZE = 24, 12, (320, 240)


def write_clip(path, frames=FRAMES, empty=()):
    """The portrait moving to the right; frames in `empty` show nothing. Its face has about 90 pixels."""
    portrait = open_portrait().crop((90, 0, 330, 240))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, SIZE)
    assert writer.isOpened()
    for number in range(frames):
        frame = Image.new("RGB", SIZE, (90, 110, 130))
        if number not in empty:
            frame.paste(portrait, (number % 40, 0))
        writer.write(np.asarray(frame)[:, :, ::-1].copy())
    writer.release()
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model.pth")


@pytest.fixture
def run(model_path):
    return lambda *args: run_main(MAIN, *args, "--checkpoint", model_path)


def test_endings():
    assert is_video("a.mp4") and is_video(Path("b.MOV")) and not is_video("c.jpg") and not is_video("mp4")


def test_frames_are_rgb_with_their_times(tmp_path):
    clip = Video(write_clip(tmp_path / "clip.mp4"))
    assert (clip.size, clip.fps, clip.count) == (SIZE, FPS, FRAMES)
    frames = list(clip)
    assert [number for number, _, _ in frames] == list(range(FRAMES))
    assert [seconds for _, seconds, _ in frames] == pytest.approx([number / FPS for number in range(FRAMES)])
    assert np.abs(frames[0][2][-5:, -5:].reshape(-1, 3).mean(0) - (90, 110, 130)).max() < 8


def test_rows_have_time_stamps(run, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", empty=range(8, 16))
    code, out, err = run(clip, "--every", 4, "--output", tmp_path / "p.csv")
    assert code == 0
    rows = rows_of(tmp_path / "p.csv")
    assert [float(row["time"]) for row in rows] == pytest.approx([n / FPS for n in range(0, FRAMES, 4)], abs=1e-3)
    assert [row["face"] for row in rows] == ["1", "1", "none", "none", "1", "1"]
    assert {row["file"] for row in rows} == {str(clip)}
    lefts = [int(row["left"]) for row in rows if row["left"]]
    assert lefts == sorted(lefts) and lefts[-1] - lefts[0] == pytest.approx(20, abs=5)
    assert out == "" and err.splitlines()[-1] == "1 video, 4 faces, 2 without a face"
    assert "clip.mp4 at 0.67 s: no face found" in run(clip, "--every", 4)[1]


def test_annotated_copy_has_the_same_frames_and_duration(run, tmp_path):
    clip = write_clip(tmp_path / "my clip.mp4", empty=range(8, 16))
    before = clip.read_bytes()
    assert run(clip, "--every", 2, "--annotate", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"my clip.faces.mp4", "my clip.timeline.png"}
    assert clip.read_bytes() == before
    copy, original = Video(tmp_path / "out" / "my clip.faces.mp4"), Video(clip)
    assert (copy.count, copy.fps, copy.size) == (original.count, original.fps, original.size)
    changed = [np.abs(a[2].astype(int) - b[2]).max(2) > 60 for a, b in zip(copy, original, strict=True)]
    assert all(frame.mean() > 0.005 for frame in changed)  # box and label, or that there is no face
    with Image.open(tmp_path / "out" / "my clip.timeline.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_images_and_videos_together(run, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", frames=3)
    open_portrait().save(tmp_path / "photo.png")
    code, out, err = run(clip, tmp_path / "photo.png", "--output", tmp_path / "p.json")
    assert code == 0 and err.splitlines()[-1] == "1 image, 1 video, 4 faces"
    files = [Path(row["file"]).name for row in rows_of(tmp_path / "p.json")]
    assert files == ["photo.png", *["clip.mp4"] * 3]


def test_ctrl_c_in_the_middle_leaves_no_file(model_path, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    (tmp_path / "p.csv").write_text("earlier")
    words = [clip, "--checkpoint", model_path, "--annotate", tmp_path / "out", "--output", tmp_path / "p.csv"]
    interrupt(MAIN, words, "draw_faces", call=5)
    assert list((tmp_path / "out").iterdir()) == [] and (tmp_path / "p.csv").read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "out", "p.csv"}


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42" + bytes(500)])
def test_broken_videos_are_named(run, model_path, tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    words = [tmp_path / "broken.mp4", "--annotate", tmp_path / "out", "--checkpoint", model_path]
    assert_refused(MAIN, words, "broken.mp4")
    code, out, err = run(tmp_path / "broken.mp4", write_clip(tmp_path / "good.mp4", frames=2))
    assert code == 0 and "broken.mp4" in err and "1 could not be read" in err


def test_an_unfinished_copy_leaves_nothing(tmp_path):
    copy = VideoCopy(tmp_path / "a.mp4", 10, (33, 21))
    copy.add(np.zeros((21, 33, 3), np.uint8))
    copy.close(keep=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"nowhere.a\.mp4"):
        VideoCopy(tmp_path / "nowhere" / "a.mp4", 10, (32, 32))


def test_without_opencv_a_video_names_what_to_install(model_path, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", frames=2)
    words = [clip, "--checkpoint", model_path]
    assert_refused(tmp_path, words, "clip.mp4", "pip install", run=run_without_opencv)
