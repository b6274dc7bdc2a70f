"""Video files: their frames, the faces in them, an annotated copy and a timeline. OpenCV reads and writes them.

Example::

    for number, seconds, pixels in Video("clip.mp4"):       # uint8 (H, W, 3) in RGB order
        ...
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from checkpoints import replace_file
from errors import InputError, printable
from faces.detector import load_opencv
from faces.overlay import Targets, draw_faces
from inference import Finder, Prediction, View, classify_batch, to_prediction

ENDINGS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv"}


def is_video(path) -> bool:
    return Path(path).suffix.lower() in ENDINGS


class Video:
    """A video file. `fps` frames a second, `size` (width, height), `count` frames as the file has it, or 0.

    Iterating, once, yields (number, seconds, pixels) of each frame, upright. The seconds are those of the file, also
    if its frames are not evenly spaced. Raises InputError if it can't be opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"can't read {path}: no such file")
        try:
            cv2 = load_opencv()
        except InputError as error:
            raise InputError(f"can't read {path}: {error}") from None
        self.capture = cv2.VideoCapture(str(path))
        is_open, frame = self.capture.read() if self.capture.isOpened() else (False, None)
        if not is_open:
            raise InputError(f"can't read {path}: no video that OpenCV can decode")
        self._first = frame
        self.size = frame.shape[1], frame.shape[0]
        fps, self.count = self.capture.get(cv2.CAP_PROP_FPS), max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.fps = fps if 0 < fps < 1000 else 25.0

    def __iter__(self) -> Iterator[tuple[int, float, np.ndarray]]:
        cv2, number, frame, seconds = load_opencv(), 0, self._first, 0.0
        try:
            while frame is not None:
                stamp = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                seconds = stamp if stamp > seconds else seconds + bool(number) / self.fps
                yield number, seconds, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                number += 1
                frame = self.capture.read()[1]
        finally:
            self.capture.release()


class VideoCopy:
    """Writes frames to an .mp4 file, which is in its place once `close` is called; nothing is left without it.

    `size` is (width, height). Raises InputError if OpenCV can't write such a video.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]):
        cv2 = load_opencv()
        self.path, self.count = path, 0
        self.size = max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2)  # codecs want even sides
        self.temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
        self.writer = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, self.size)
        if not self.writer.isOpened():
            raise InputError(f"can't write {path}: OpenCV could not start an mp4v video of {self.size} pixels there")

    def add(self, image) -> None:
        """A frame, PIL or uint8 (H, W, 3) in RGB order, brought to the copy's size."""
        cv2, pixels = load_opencv(), np.asarray(image)
        if pixels.shape[1::-1] != self.size:
            pixels = cv2.resize(pixels, self.size, interpolation=cv2.INTER_AREA)
        self.writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self, *, keep: bool = True) -> None:
        """Puts the file in its place, or with `keep` False leaves nothing. InputError if not all was written."""
        self.writer.release()
        try:
            if keep:
                self._check()
                os.replace(self.temporary, self.path)
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                self.temporary.unlink()

    def _check(self) -> None:
        """OpenCV does not report a full disk, so the frames in the file are counted."""
        cv2 = load_opencv()
        capture = cv2.VideoCapture(str(self.temporary))
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written < self.count:
            raise InputError(f"can't write {self.path}: {written} of {self.count} frames arrived; is the disk full?")


def predict_video(
    model: nn.Module, video: Video, source: str, find: Finder, *, every: int = 1, targets: Targets | None = None
) -> Iterator[tuple[View, Prediction | None]]:
    """Yields (view, prediction) of every `every`th frame of a video, which views call `source`; None without a face.

    With `targets` there is also a copy, where frames in between show what the last one classified did, and a timeline
    of the largest face. Memory does not grow with the length of the video, except for the timeline's points. Raises
    InputError if the copy or the timeline can't be written.
    """
    class_names = model.info.class_names
    copy = VideoCopy(targets(source, ".faces.mp4"), video.fps, video.size) if targets else None
    points, number, is_whole = [], 0, False
    try:
        with tqdm(total=video.count or None, desc=printable(source), unit="frames", leave=False, disable=None) as bar:
            for number, seconds, pixels in video:
                bar.update()
                if number % every == 0:
                    time = round(seconds, 3)
                    results = [
                        (replace(view, source=source, time=time), to_prediction(probs, class_names))
                        for view, probs in classify_batch(model, find(pixels))
                    ]
                    _, prediction = results[0]
                    if copy and prediction:
                        points.append((seconds, *(percent / 100 for percent in prediction[2].values())))
                    yield from results
                if copy:
                    shown = [(view.face, prediction) for view, prediction in results]
                    copy.add(draw_faces(pixels, shown, enlarge=False))
            is_whole = True
    finally:
        if copy:
            copy.close(keep=is_whole)
    if number + 1 < 0.98 * video.count:  # many files only estimate it
        print(f"{printable(source)}: {number + 1:,} of {video.count:,} frames could be read", file=sys.stderr)
    if points:
        import reports

        title = Path(source).name + (", largest face" if results[0][0].kind != "whole" else "")
        target = targets(source, ".timeline.png")
        replace_file(target, lambda path: reports.plot_timeline(points, class_names, path, title=title))
