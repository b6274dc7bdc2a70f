"""A camera, or a video file in its place: the newest frame, faces followed from frame to frame, smoothed probabilities.

OpenCV opens cameras, and nothing else needs it. Example::

    for pixels, results in watch(model, class_names, Camera("0")):      # results: [(view, prediction), ...]
        ...
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from torch import nn

from errors import InputError
from faces.align import align_face
from faces.detector import find_faces
from faces.tracking import Tracker
from faces.video import Video
from inference import Prediction, View, classify_batch, to_prediction
from preprocessing import read_image


@cache
def load_opencv():
    """The module cv2, version 4 or 5. Raises InputError with what to install if it is missing or broken."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # what is wrong is reported in one line of ours
    os.environ.setdefault("OPENCV_VIDEOIO_MSMF_ENABLE_HW_TRANSFORMS", "0")  # or Windows takes a minute per camera
    try:
        import cv2

        if not hasattr(cv2, "VideoCapture"):  # as in the folder that an uninstalled one leaves behind
            raise ImportError("what is installed has no VideoCapture")
    except Exception as error:  # a broken build raises anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "pip install opencv-python, or opencv-python-headless without a window"
        raise InputError(f"cameras and windows need OpenCV: {hint} ({reason})") from None
    return cv2


class Camera:
    """The newest frame of a camera, or of a file played at its speed; frames that nobody asked for in time are dropped.

    `source` is a camera's number or a video file's name, `timeout` in seconds. `with Camera("0") as camera` closes it.
    A file starts to play when its first frame is taken. Raises InputError, also while iterating, if there is no such
    camera, another program has it, or it stops sending images. Iterating yields uint8 (H, W, 3) in RGB order.
    """

    def __init__(self, source: str, *, timeout: float = 5.0):
        self.timeout = timeout
        if source.isdecimal():
            capture = load_opencv().VideoCapture(int(source))
            if not capture.isOpened():
                raise InputError(f"no camera {source}, or another program has it; try another number or a video file")
            frames = self._capture(capture)
        else:
            frames = self._play(Video(source))  # raises InputError with what is wrong with it
        self._frame, self._number, self._has_ended, self._error = None, 0, False, None  # under the lock of _news
        kind = "camera" if source.isdecimal() else "video"
        self._lost = InputError(f"{kind} {source} has stopped sending images; is it still there?")
        self._news, self._stop, self._taken = threading.Condition(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read, args=[frames], daemon=True)
        self._thread.start()

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._taken.set()
        self._thread.join(self.timeout)

    def _capture(self, capture) -> Iterator[np.ndarray]:
        """The frames of an opened camera, until five are missed in a row: one lost frame is no lost camera."""
        cv2, misses = load_opencv(), 0
        try:
            while misses < 5:
                is_there, frame = capture.read()
                misses = 0 if is_there else misses + 1
                if is_there:
                    yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()
        raise self._lost

    def _play(self, video: Video) -> Iterator[np.ndarray]:
        """The frames of a file, each when it is due; the clock starts when the first is taken."""
        start = None
        for _, seconds, pixels in video:
            if start is not None:
                self._stop.wait(start + seconds - time.monotonic())
            yield pixels
            if start is None:
                self._taken.wait()
                start = time.monotonic() - seconds

    def _read(self, frames: Iterator[np.ndarray]) -> None:
        error = None
        try:
            with contextlib.closing(frames):
                for frame in frames:
                    if self._stop.is_set():
                        break
                    with self._news:
                        self._frame, self._number = frame, self._number + 1
                        self._news.notify_all()
        except InputError as caught:
            error = caught
        finally:
            with self._news:
                self._has_ended, self._error = True, error
                self._news.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        seen = 0
        while True:
            with self._news:
                is_new = self._news.wait_for(lambda: self._number > seen or self._has_ended, self.timeout)  # noqa: B023
                frame, number = self._frame, self._number
            if number > seen:
                self._taken.set()
                seen = number
                yield frame
            elif is_new and not self._error:
                return
            else:
                raise self._error or self._lost

    def for_seconds(self, seconds: float) -> Iterator[np.ndarray]:
        """Yields frames for `seconds` seconds, counted from the first frame."""
        end = None
        for pixels in self:
            end = end or time.monotonic() + seconds
            yield pixels
            if time.monotonic() > end:
                return


def watch(
    model: nn.Module,
    class_names: list[str],
    frames: Iterable[np.ndarray],
    *,
    smooth: float = 0.7,
    detect_every: int = 3,
    min_size: int | None = None,
) -> Iterator[tuple[np.ndarray, list[tuple[View, Prediction]]]]:
    """Yields (pixels, [(view of a face, smoothed prediction), ...]) of each of `frames`, uint8 (H, W, 3) in RGB order.

    Faces are looked for in every `detect_every`th frame and taken to stay where they are in between, where they are
    classified all the same. A face keeps its number. `min_size` as for find_faces.
    """
    tracker = Tracker(smooth)
    for number, pixels in enumerate(frames):
        if number % detect_every == 0:
            tracker.detect(find_faces(pixels, min_size=min_size, turns=False))
        views = [View(None, "face", track.number, track.face) for track in tracker.found]
        crops = [read_image(align_face(pixels, view.face), model.info.input_spec) for view in views]
        results = classify_batch(model, list(zip(views, crops, strict=True)))
        tracker.classify([to_prediction(probs, class_names) for _, probs in results])
        yield pixels, [(view, track.prediction) for view, track in zip(views, tracker.found, strict=True)]
