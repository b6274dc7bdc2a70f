"""Videos as input: rows with time stamps, an annotated copy, a timeline; clips are built from a portrait."""

from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, interrupt, open_portrait, refusal, run
from PIL import Image
from test_predict import rows_of

from faces.video import Video, VideoCopy, is_video
from predict_emotion import main

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
FRAMES, FPS, SIZE = 12, 12, (320, 240)


def write_clip(path, frames=FRAMES, empty=()):
    """The portrait moving to the right; frames in `empty` show nothing. Its face has about 90 pixels."""
    portrait = open_portrait().crop((90, 0, 330, 240))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, SIZE)
    assert writer.isOpened()
    for number in range(frames):
        frame = Image.new("RGB", SIZE, (90, 110, 130))
        if number not in empty:
            frame.paste(portrait, (2 * number, 0))
        writer.write(np.asarray(frame)[:, :, ::-1].copy())
    writer.release()
    return path


def test_frames_are_rgb_with_their_times(tmp_path):
    assert is_video("a.mp4") and is_video(Path("b.MOV")) and not is_video("c.jpg") and not is_video("mp4")
    clip = Video(write_clip(tmp_path / "clip.mp4"))
    assert (clip.size, clip.fps, clip.count) == (SIZE, FPS, FRAMES)
    numbers, seconds, frames = zip(*clip, strict=True)
    assert numbers == tuple(range(FRAMES)) and seconds == pytest.approx([number / FPS for number in numbers])
    assert np.abs(frames[0][-5:, -5:].reshape(-1, 3).mean(0) - (90, 110, 130)).max() < 8


def test_rows_have_time_stamps(checkpoint, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", empty=range(4, 8))
    code, out, err = run(main, "--checkpoint", checkpoint, clip, "--every", 2, "--output", tmp_path / "p.csv")
    assert (code, out) == (0, "") and err.splitlines()[-1] == "1 video, 4 faces, 2 without a face"
    rows = rows_of(tmp_path / "p.csv")
    assert [float(row["time"]) for row in rows] == pytest.approx([n / FPS for n in range(0, FRAMES, 2)], abs=1e-3)
    assert [row["face"] for row in rows] == ["1", "1", "none", "none", "1", "1"]
    assert {row["file"] for row in rows} == {str(clip)}
    lefts = [int(row["left"]) for row in rows if row["left"]]
    assert lefts == sorted(lefts) and lefts[-1] - lefts[0] == pytest.approx(20, abs=5)
    assert "clip.mp4 at 0.33 s: no face found" in run(main, "--checkpoint", checkpoint, clip, "--every", 4)[1]


def test_annotated_copy_has_the_same_frames_and_duration(checkpoint, tmp_path):
    clip = write_clip(tmp_path / "my clip.mp4", empty=range(4, 8))
    before = clip.read_bytes()
    assert run(main, "--checkpoint", checkpoint, clip, "--every", 2, "--annotate", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"my clip.faces.mp4", "my clip.timeline.png"}
    assert clip.read_bytes() == before
    copy, original = Video(tmp_path / "out" / "my clip.faces.mp4"), Video(clip)
    assert (copy.count, copy.fps, copy.size) == (original.count, original.fps, original.size)
    changed = [np.abs(a[2].astype(int) - b[2]).max(2) > 60 for a, b in zip(copy, original, strict=True)]
    assert all(frame.mean() > 0.005 for frame in changed)  # box and label, or that there is no face
    assert len(Image.open(tmp_path / "out" / "my clip.timeline.png").convert("RGB").getcolors(10**6)) > 20


def test_ctrl_c_in_the_middle_leaves_no_file(checkpoint, tmp_path):
    clip, table = write_clip(tmp_path / "clip.mp4"), tmp_path / "p.csv"
    table.write_text("earlier")
    words = [clip, "--checkpoint", checkpoint, "--annotate", tmp_path / "out", "--output", table]
    interrupt(main, words, "draw_faces", call=5)
    assert list((tmp_path / "out").iterdir()) == [] and table.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "out", "p.csv"}


@pytest.mark.parametrize("content", [b"", b"\0\0\0\x18ftypmp42" + bytes(500)], ids=["empty", "damaged"])
def test_broken_videos_are_named_among_good_ones_and_photos(checkpoint, tmp_path, content):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    assert_refused(main, [broken, "--annotate", tmp_path / "out", "--checkpoint", checkpoint], broken)
    clip, photo = write_clip(tmp_path / "clip.mp4", frames=2), tmp_path / "photo.png"
    open_portrait().save(photo)
    code, _, err = run(main, "--checkpoint", checkpoint, broken, clip, photo, "--output", tmp_path / "p.json")
    assert code == 0 and "broken.mp4" in err and err.endswith("1 image, 1 video, 3 faces, 1 could not be read\n")
    assert [row["file"] for row in rows_of(tmp_path / "p.json")] == [str(path) for path in (photo, clip, clip)]


def test_an_unfinished_copy_leaves_nothing(tmp_path):
    copy = VideoCopy(tmp_path / "a.mp4", 10, (33, 21))
    copy.add(np.zeros((21, 33, 3), np.uint8))
    copy.close(keep=False)
    assert list(tmp_path.iterdir()) == []
    assert "a.mp4" in refusal(VideoCopy, tmp_path / "nowhere" / "a.mp4", 10, (32, 32))
