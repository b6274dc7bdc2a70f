"""Emotions live, from a camera or a video file: boxes, labels, bars and frames per second. q or Esc ends.

    python -m examples.emotion_cam                              # camera 0
    python -m examples.emotion_cam --source clip.mp4
    python -m examples.emotion_cam --source clip.mp4 --headless out.mp4       # write instead of showing

Probabilities are smoothed per face (--smooth 0 turns it off), faces are looked for in every third frame, and frames
that come faster than they can be worked through are dropped. Nothing is sent anywhere, or stored without --headless.
Cameras and the window need OpenCV: pip install opencv-python (without a window, opencv-python-headless is enough).
"""

import contextlib
import os
import sys
import time
from collections import deque
from itertools import repeat, takewhile, tee
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from console import ArgumentParser, check_writable, number, run_script
from errors import InputError, printable
from faces.camera import Camera, load_opencv, watch
from faces.overlay import draw_faces
from faces.video import Video, VideoCopy
from predict_emotion import BUNDLED, load_model

TITLE = "Emotions (q ends)"


class Rate:
    """Frames per second over the last 30 of them."""

    def __init__(self):
        self.times = deque(maxlen=30)

    def tick(self) -> float:
        self.times.append(time.perf_counter())
        return (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9)


def draw(pixels: np.ndarray, results: list, fps: float) -> Image.Image:
    image = draw_faces(pixels, results, enlarge=False)
    font = ImageFont.load_default(max(13, image.height // 30))
    ImageDraw.Draw(image).text(
        (8, image.height - 1.6 * font.size), f"{fps:.0f} frames/s", "white", font, stroke_width=2, stroke_fill="black"
    )
    return image


def check_window() -> None:
    """InputError if no window can be shown; without a display, some builds of OpenCV end the whole process."""
    cv2 = load_opencv()
    hint = "uninstall opencv-python-headless and pip install opencv-python, or pass --headless out.mp4"
    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"} & set(os.environ):
        raise InputError("no window: there is no display; pass --headless out.mp4")
    try:
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    except cv2.error:
        raise InputError(f"no window: this OpenCV is the headless one; {hint}") from None


def run_in_window(source: str, see, seconds: float) -> None:
    check_window()
    cv2, rate = load_opencv(), Rate()
    with Camera(source) as camera:
        for pixels, results in see(camera.for_seconds(seconds)):
            if not rate.times:
                cv2.resizeWindow(TITLE, *pixels.shape[1::-1])
            cv2.imshow(TITLE, np.asarray(draw(pixels, results, rate.tick()))[:, :, ::-1])
            is_ended = cv2.waitKey(1) & 0xFF in (ord("q"), 27)
            if is_ended or cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1:
                break


class Recording:
    """An .mp4 file, with the sound of `source`, that is kept however the recording ends, with what it had by then."""

    def __init__(self, target: Path, fps: float, source: Video | None = None, *, by_clock: bool):
        self.target, self.fps, self.source, self.by_clock = target, fps, source, by_clock
        self.copy, self.frames, self.with_face, self.start = None, 0, 0, time.perf_counter()

    def add(self, image: Image.Image, has_face: bool, seconds: float | None = None) -> None:
        self.copy = self.copy or VideoCopy(self.target, self.fps, image.size, self.source)
        self.frames, self.with_face = self.frames + 1, self.with_face + has_face
        due = self.copy.count + 1
        if self.by_clock:  # a camera's frames come as they come, and the file should play at life's speed
            due = int((time.perf_counter() - self.start) * self.fps) + 1
        while self.copy.count < due:
            self.copy.add(image, seconds)

    def close(self) -> None:
        if self.copy:
            self.copy.close()
            rate = self.frames / (time.perf_counter() - self.start)
            share = 100 * self.with_face / self.frames
            print(f"{self.frames:,} frames, {share:.0f}% with a face, {rate:.1f} frames/s; {printable(self.target)}")


def run_headless(source: str, see, seconds: float, target: Path) -> None:
    """Writes what the window would show; of a file every frame, of a camera what it can keep up with."""
    rate = Rate()
    with contextlib.ExitStack() as stack:
        if source.isdecimal():
            frames, times = stack.enter_context(Camera(source)).for_seconds(seconds), repeat(None)
            recording = Recording(target, 15.0, by_clock=True)
        else:
            video = Video(source)
            timed, again = tee(takewhile(lambda item: item[1] <= seconds, video))
            frames, times = (pixels for _, _, pixels in timed), (time for _, time, _ in again)
            recording = Recording(target, video.fps, video, by_clock=False)
        stack.enter_context(contextlib.closing(recording))
        for (pixels, results), time_of_frame in zip(see(frames), times, strict=False):
            recording.add(draw(pixels, results, rate.tick()), bool(results), time_of_frame)


def check_target(target: Path, source: str) -> None:
    """InputError if --headless names no file that can be written, or the source itself."""
    if target.suffix.lower() != ".mp4":
        raise InputError(f"--headless {target}: the name must end in .mp4")
    if os.path.realpath(target) == os.path.realpath(source):
        raise InputError(f"--headless {target} is the source itself; choose another name")
    check_writable(target, "--headless")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--source", default="0", help="a camera's number or a video file")
    add("--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)")
    smooth = number(float, 0, 1, below=True)
    add("--smooth", type=smooth, default=0.7, help="share that the past keeps; 0 is off")
    add("--detect-every", type=number(int, 1), default=3, metavar="N", help="look for faces in every Nth frame")
    add("--min-face", type=number(int, 1), default=60, metavar="PIXELS", help="the smallest face")
    add("--headless", metavar="FILE", help="write to this .mp4 file instead of showing a window")
    add("--seconds", type=float, default=float("inf"), help="stop after this time (default: never)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        raise InputError(f"--seconds must be above 0, not {args.seconds}")
    if args.headless:
        check_target(Path(args.headless), args.source)
    model, class_names = load_model(args.checkpoint, args.device)

    def see(frames):
        options = {"smooth": args.smooth, "detect_every": args.detect_every, "min_size": args.min_face}
        return watch(model, class_names, frames, **options)

    if args.headless:
        run_headless(args.source, see, args.seconds, Path(args.headless))
    else:
        run_in_window(args.source, see, args.seconds)


if __name__ == "__main__":
    run_script(main)
