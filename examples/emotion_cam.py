"""Emotions live, from a camera or a video file: boxes, labels, bars and frames per second. q or Esc ends.

    python -m examples.emotion_cam                              # camera 0
    python -m examples.emotion_cam --source clip.mp4
    python -m examples.emotion_cam --source clip.mp4 --headless out.mp4       # write instead of showing

Probabilities are smoothed per face (--smooth 0 turns it off), faces are looked for in every third frame, and frames
that come faster than they can be worked through are dropped. Nothing is sent anywhere or stored, but by --headless.
The window needs the full OpenCV: pip uninstall opencv-python-headless, then pip install "opencv-python>=4.10,<5".
"""

import time
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from console import ArgumentParser, run_script
from faces import load_opencv
from live import Camera, watch
from models import InputError
from overlay import draw_faces
from predict_emotion import load_model
from video import Video, VideoCopy

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
    ImageDraw.Draw(image).text((8, image.height - 1.6 * font.size), f"{fps:.0f} frames/s", "white", font,
                               stroke_width=2, stroke_fill="black")  # fmt: skip
    return image


def show(cv2, image: Image.Image) -> bool:
    """Puts a frame into the window; False once q or Esc was pressed or the window closed."""
    try:
        cv2.imshow(TITLE, np.asarray(image)[:, :, ::-1])
        key = cv2.waitKey(1) & 0xFF
        return key not in (ord("q"), 27) and cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error:
        raise InputError(
            'no window: this OpenCV is the headless one, or there is no display; pip install "opencv-python>=4.10,<5" '
            "in its place, or pass --headless out.mp4"
        ) from None


def run_in_window(source: str, see, seconds: float) -> None:
    cv2, rate, camera = load_opencv(), Rate(), Camera(source)
    try:
        for pixels, results in see(camera.for_seconds(seconds)):
            if not show(cv2, draw(pixels, results, rate.tick())):
                break
    finally:
        camera.close()


def run_headless(source: str, see, seconds: float, target: Path) -> None:
    """Writes what the window would show; of a file every frame, of a camera what it can keep up with."""
    if source.isdecimal():
        camera = Camera(source)
        fps, frames, close = 15.0, camera.for_seconds(seconds), camera.close
    else:
        video = Video(source)
        fps, frames, close = video.fps, (frame for _, when, frame in video if when <= seconds), lambda: None
    rate, copy, shown, faces, start, is_whole = Rate(), None, 0, 0, time.perf_counter(), False
    try:
        for pixels, results in see(frames):
            copy = copy or VideoCopy(target, fps, pixels.shape[1::-1])
            copy.add(draw(pixels, results, rate.tick()))
            shown, faces = shown + 1, faces + bool(results)
        is_whole = True
    finally:
        close()
        if copy:
            copy.close(keep=is_whole)
    spent = time.perf_counter() - start
    print(f"{shown:,} frames, {100 * faces / max(1, shown):.0f}% with a face, {shown / spent:.1f} frames/s; {target}")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="0", help="a camera's number or a video file (default: 0)")
    parser.add_argument("--checkpoint", metavar="PATH", help="(default: best_emotion_model.pth here, else "
                        "weights/emotion_model.pth)")  # fmt: skip
    parser.add_argument("--smooth", type=float, default=0.7, help="share that the past keeps; 0 is off (default: 0.7)")
    parser.add_argument("--detect-every", type=int, default=3, metavar="N", help="look for faces in every Nth frame "
                        "(default: 3)")  # fmt: skip
    parser.add_argument("--min-face", type=int, default=60, metavar="PIXELS", help="the smallest face (default: 60)")
    parser.add_argument("--yunet", metavar="FILE", help="YuNet's .onnx file, in the place of the cascade")
    parser.add_argument("--headless", metavar="FILE", help="write to this .mp4 file instead of showing a window")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many (default: never)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise InputError(f"--smooth must be at least 0 and below 1, not {args.smooth}")
    for flag, value in (("--detect-every", args.detect_every), ("--min-face", args.min_face)):
        if value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}")
    if args.headless and Path(args.headless).suffix.lower() != ".mp4":
        raise InputError(f"--headless {args.headless}: the name must end in .mp4")
    model, class_names = load_model(args.checkpoint, args.device)

    def see(frames):
        options = {"smooth": args.smooth, "detect_every": args.detect_every}
        return watch(model, class_names, frames, min_size=args.min_face, yunet=args.yunet, **options)

    if args.headless:
        run_headless(args.source, see, args.seconds, Path(args.headless))
    else:
        run_in_window(args.source, see, args.seconds)


if __name__ == "__main__":
    run_script(main)
