"""A camera, or a file in its place: the newest frame, faces followed from frame to frame, smoothed probabilities.

Example::

    for pixels, results in watch(model, class_names, Camera("0")):      # results: [(face, prediction), ...]
        ...
"""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from errors import InputError
from faces.detector import Face, crop_face, find_faces, load_opencv
from faces.video import Video
from inference import Prediction, View, classify_batch, to_prediction
from preprocessing import read_image


class Camera:
    """The newest frame of a camera, or of a file played at its speed; frames that nobody asked for in time are dropped.

    `source` is a camera's number or a file's name, `timeout` in seconds. `with Camera("0") as camera` closes it.
    Raises InputError, also while iterating, if there is no such camera, another program has it, or it stops sending
    images. Iterating yields uint8 (H, W, 3) in RGB order.
    """

    def __init__(self, source: str, *, timeout: float = 5.0):
        self.source, self.timeout, self.is_camera = source, timeout, source.isdecimal()
        if self.is_camera:
            self.capture, self.pause = load_opencv().VideoCapture(int(source)), 0.0
            if not self.capture.isOpened():
                raise InputError(f"no camera {source}, or another program has it; try another number or a video file")
        else:
            video = Video(source)  # raises InputError with what is wrong with it
            self.capture, self.pause = video.capture, 1 / video.fps
        self._frame, self._number, self._ended = None, 0, False  # under the lock of _news
        self._news, self._stop = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(self.timeout)

    def _read(self) -> None:
        due, misses = time.monotonic(), 0
        try:
            while not self._stop.is_set() and misses < (5 if self.is_camera else 1):  # one lost frame is no lost camera
                is_there, frame = self.capture.read()
                misses = 0 if is_there else misses + 1
                if is_there:
                    with self._news:
                        self._frame, self._number = frame, self._number + 1
                        self._news.notify_all()
                due += self.pause
                self._stop.wait(max(0.0, due - time.monotonic()) if self.pause else 0.0)
        finally:
            self.capture.release()
            with self._news:
                self._ended = True
                self._news.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        cv2, seen = load_opencv(), 0
        while True:
            with self._news:
                self._news.wait_for(lambda: self._number > seen or self._ended, self.timeout)  # noqa: B023
                frame, number, ended = self._frame, self._number, self._ended
            if number == seen:
                if ended and not self.is_camera:
                    return
                kind = "camera" if self.is_camera else "video"
                raise InputError(f"{kind} {self.source} has stopped sending images; is it still there?")
            seen = number
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def for_seconds(self, seconds: float) -> Iterator[np.ndarray]:
        """Its frames for so long from the first one on."""
        end = None
        for pixels in self:
            end = end or time.monotonic() + seconds
            yield pixels
            if time.monotonic() > end:
                return


@dataclass
class Track:
    """A face that is followed: where it was last, its smoothed probabilities in percent, how often it was missed."""

    face: Face
    probs: dict[str, float] | None = None
    missed: int = 0

    @property
    def prediction(self) -> Prediction:
        best = max(self.probs, key=self.probs.get)
        return best, self.probs[best], self.probs


class Tracker:
    """Follows faces from one detection to the next and smooths each one's probabilities exponentially.

    `smooth` is the share that the past keeps at every frame (0 is off); a face not found for `patience` detections
    is gone. A found face belongs to the nearest one before it, if that is less than half its width away.
    """

    def __init__(self, smooth: float = 0.7, patience: int = 3):
        self.smooth, self.patience, self.tracks = smooth, patience, []

    def detect(self, found: list[Face]) -> None:
        """Takes the faces of a new detection."""
        pairs = sorted(
            ((_distance(track.face, face), t, f) for t, track in enumerate(self.tracks) for f, face in enumerate(found))
        )
        taken, placed = set(), set()
        for distance, t, f in pairs:
            if distance < 0.5 and t not in taken and f not in placed:
                taken.add(t)
                placed.add(f)
                self.tracks[t].face, self.tracks[t].missed = found[f], 0
        for t, track in enumerate(self.tracks):
            track.missed += t not in taken
        self.tracks = [track for track in self.tracks if track.missed < self.patience]
        self.tracks += [Track(face) for f, face in enumerate(found) if f not in placed]

    @property
    def found(self) -> list[Track]:
        """Those that the last detection saw."""
        return [track for track in self.tracks if not track.missed]

    def classify(self, predictions: list[Prediction]) -> None:
        """Takes a prediction for each track in `found`, in their order."""
        for track, (_, _, probs) in zip(self.found, predictions, strict=True):
            past = track.probs or probs
            track.probs = {name: self.smooth * past[name] + (1 - self.smooth) * value for name, value in probs.items()}


def _distance(one: Face, other: Face) -> float:
    """Between the centers, in widths of the larger face."""
    x = one.left + one.width / 2 - other.left - other.width / 2
    y = one.top + one.height / 2 - other.top - other.height / 2
    return float(np.hypot(x, y)) / max(one.width, other.width)


def watch(
    model: nn.Module,
    class_names: list[str],
    frames: Iterable[np.ndarray],
    *,
    smooth: float = 0.7,
    detect_every: int = 3,
    min_size: int | None = None,
    yunet: str | Path | None = None,
) -> Iterator[tuple[np.ndarray, list[tuple[Face, Prediction]]]]:
    """Yields (pixels, [(face, smoothed prediction), ...]) of each of `frames`, uint8 (H, W, 3) in RGB order.

    Faces are looked for in every `detect_every`th frame and taken to stay where they are in between, where they are
    classified all the same. Raises InputError if the detector can't be used.
    """
    tracker = Tracker(smooth)
    for number, pixels in enumerate(frames):
        if number % detect_every == 0:
            tracker.detect(find_faces(pixels, min_size=min_size, yunet=yunet))
        crops = [crop_face(pixels, track.face) for track in tracker.found]
        results = classify_batch(model, [(View(None), read_image(crop, model.info.input_spec)) for crop in crops])
        tracker.classify([to_prediction(probs, class_names) for _, probs in results])
        yield pixels, [(track.face, track.prediction) for track in tracker.found]
