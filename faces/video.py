"""Video files: their frames, the faces in them, an annotated copy and a timeline. PyAV reads and writes them.

Example::

    for number, seconds, pixels in Video("clip.mp4"):       # uint8 (H, W, 3) in RGB order
        ...
"""

import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from checkpoints import replace_file
from errors import InputError, printable, reason_of
from faces.align import Face
from faces.overlay import Targets, draw_faces
from faces.tracking import Tracker
from inference import Finder, Prediction, View, classify_batch, to_prediction

ENDINGS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv"}
TICK = Fraction(1, 90_000)  # seconds; the unit of a copy's times
COPIED_SOUND = {"aac", "mp3"}  # what every browser and phone plays in an .mp4 file


def is_video(path) -> bool:
    return Path(path).suffix.lower() in ENDINGS


def load_av(purpose: str):
    """The module av. Raises InputError, which begins with `purpose`, if it is missing."""
    try:
        import av
    except ImportError:
        raise InputError(f"{purpose}: videos need PyAV; pip install av") from None
    return av


class Video:
    """A video file: `fps` frames a second on average, `size` (width, height), `count` frames as it has it, or 0.

    Yields (number, seconds, pixels) for each frame, upright, with the file's own times, and only once. `end` is when
    the last frame yielded ends, `length` the duration that the file states (longer than `end` if the file is cut off),
    `is_finished` whether all frames have been yielded. Raises InputError if the file can't be opened.
    """

    def __init__(self, path: str | Path):
        self.path, self.end, self.is_finished, self._first = Path(path), 0.0, False, None
        if not self.path.is_file():
            raise InputError(f"can't read {path}: no such file")
        av = load_av(f"can't read {path}")
        try:
            self._container = av.open(str(self.path.absolute()), metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no video that PyAV can decode"
            raise InputError(f"can't read {path}: {reason}") from None
        stream = self._container.streams.best("video")
        if stream and stream.codec_context:
            stream.thread_type = "AUTO"  # frames side by side too
            self._frames = _decode(self._container, stream)
            self._first = next(self._frames, None)
        if not self._first:
            self._container.close()
            raise InputError(f"can't read {path}: no video that PyAV can decode")
        height, width = _upright(self._first).shape[:2]
        rate = float(stream.average_rate or 0)
        self.size, self.fps, self.count = (width, height), rate if 0 < rate < 1000 else 25.0, stream.frames
        self.start = max(0, self._container.start_time or 0) / 1e6  # what begins before 0 is sound that is not heard
        self.length = float((stream.duration or 0) * stream.time_base) or (self._container.duration or 0) / 1e6

    def __iter__(self) -> Iterator[tuple[int, float, np.ndarray]]:
        seconds = -1 / self.fps
        with self._container:
            for number, frame in enumerate(chain([self._first], self._frames)):
                time = seconds + 1 / self.fps if frame.time is None else frame.time - self.start
                seconds = max(time, seconds + 0.001)  # the times of a copy have to rise
                self.end = seconds + (float((frame.duration or 0) * frame.time_base) or 1 / self.fps)
                yield number, seconds, _upright(frame)
            self.is_finished = True


def _decode(container, stream) -> Iterator:
    """The frames of a stream, without what can't be decoded."""
    import av

    packets = container.demux(stream)
    while True:
        with contextlib.suppress(av.FFmpegError):
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()


def _upright(frame) -> np.ndarray:
    """A frame as it is shown, uint8 (H, W, 3)."""
    pixels = frame.to_ndarray(format="rgb24")
    if matrix := frame.side_data.get("DISPLAYMATRIX"):  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


class VideoCopy:
    """Writes frames to an .mp4 file (H.264), which appears at `path` when `close` is called, and not before.

    `size` is (width, height). With `source`, a Video, its sound is added. Raises InputError if that can't be written.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int], source: Video | None = None):
        av = load_av(f"can't write {path}")
        self.path, self.fps, self.source, self.count, self.seconds = path, fps, source, 0, 0.0
        self.size = max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2)  # H.264 wants even sides
        self._temporary = path.absolute().with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
        with self._reporting():
            self._container = av.open(str(self._temporary), "w", options={"movflags": "+faststart"})
            options = {"preset": "veryfast", "crf": "20", "bf": "0"}  # with B-frames the last one ends too soon
            rate = Fraction(fps).limit_denominator(1001)
            self._stream = self._container.add_stream("libx264", rate, options, time_base=TICK, pix_fmt="yuv420p")
            codec = self._stream.codec_context
            codec.width, codec.height = self.size
            codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1  # BT.709
            self._sound = _copy_sound(source, self._container) if source else iter(())
            self._container.start_encoding()

    def add(self, image, seconds: float | None = None) -> None:
        """A frame, PIL or uint8 (H, W, 3) in RGB order, brought to the copy's size.

        It is shown from `seconds` on, which must rise from frame to frame; without them the copy has `fps`.
        """
        import av

        self.seconds = self.count / self.fps if seconds is None else seconds
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        frame = frame.reformat(*self.size, "yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = round(self.seconds / TICK), TICK
        with self._reporting():
            self._container.mux(self._stream.encode(frame))
            self._add_sound(until=self.seconds)
        self.count += 1

    def _add_sound(self, until: float) -> None:
        for packet in self._sound:
            self._container.mux(packet)
            if packet.pts * packet.time_base > until:
                break

    def close(self, *, keep: bool = True) -> None:
        """Moves the finished file to `path`, or deletes it if `keep` is False. InputError if it can't be written.

        If the source was not read to its end, the sound ends with the last frame.
        """
        is_whole = self.source and self.source.is_finished
        try:
            if keep:
                with self._reporting():
                    self._container.mux(self._stream.encode(None))
                    self._add_sound(until=math.inf if is_whole else self.seconds + 1 / self.fps)
                    self._container.close()
                replace_file(self.path, lambda target: os.replace(self._temporary, target))
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(Exception):  # closing a file writes its end, which can fail like anything before
            self._container.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        import av

        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as error:
            self._discard()
            raise InputError(f"can't write {self.path}: {getattr(error, 'strerror', '') or reason_of(error)}") from None


def _copy_sound(video: Video, copy) -> Iterator:
    """Adds a stream to the container `copy`; returns its packets: the sound of `video`, anew in AAC if need be."""
    import av

    container = av.open(str(video.path.absolute()), metadata_errors="ignore")
    sound = container.streams.best("audio")
    if not sound or not sound.codec_context:
        container.close()
        return iter(())
    is_copied = sound.codec_context.codec.canonical_name in COPIED_SOUND
    stream = copy.add_stream_from_template(sound) if is_copied else copy.add_stream("aac", 48_000, layout="stereo")

    def read() -> Iterator:
        with container, contextlib.suppress(av.FFmpegError, ValueError):  # what is damaged ends it
            for item in container.demux(sound) if is_copied else _decode(container, sound):
                if item.pts is None:  # at the end
                    continue
                item.pts -= round(video.start / item.time_base)
                if is_copied:
                    item.dts, item.stream = item.pts, stream
                yield from [item] if is_copied else stream.encode(item)
            yield from () if is_copied else stream.encode(None)

    return read()


class Course:
    """Follows the faces of a video: their numbers, the smoothed prediction of the largest one, and how long it showed
    each emotion. A frame that is classified whole counts as one face."""

    def __init__(self, video: Video, every: int):
        self.tracker = Tracker(patience=max(3, round(video.fps / every)))  # a second
        self.tracker.smooth **= every  # so that it takes as long as with every frame
        self.whole, self.times, self.seconds = Face(0, 0, *video.size, 1.0, ()), Counter(), 0.0
        self.largest: Prediction | None = None

    def add(self, results: list[tuple[View, Prediction | None]]) -> list[tuple[View, Prediction | None]]:
        """Takes what a frame shows, the largest face first; returns it with the numbers that faces keep."""
        found = {view.face or self.whole: prediction for view, prediction in results if prediction}
        self.tracker.detect(list(found))
        self.tracker.classify([found[track.face] for track in self.tracker.found])
        tracks = {track.face: track for track in self.tracker.found}
        self.largest = tracks[next(iter(found))].prediction if found else None
        return [(replace(view, number=tracks[view.face].number), p) if view.face else (view, p) for view, p in results]

    def go_on(self, seconds: float) -> None:
        """Counts the time up to `seconds` toward the emotion that was added last."""
        self.times[self.largest and self.largest[0]] += seconds - self.seconds
        self.seconds = seconds

    def shares(self) -> tuple[list[str], float]:
        """Such as ["happy 62%", "sad 38%"], and the seconds that they are shares of: those with a prediction."""
        times = [(emotion, seconds) for emotion, seconds in self.times.most_common() if emotion is not None]
        total = sum(seconds for _, seconds in times)
        return [f"{emotion} {seconds / total:.0%}" for emotion, seconds in times if seconds >= total / 200], total


def predict_video(
    model: nn.Module, video: Video, source: str, find: Finder, *, every: int = 1, targets: Targets | None = None
) -> Iterator[tuple[View, Prediction | None]]:
    """Yields (view, prediction) for every `every`th frame; view.source is `source`, prediction None without a face.

    A face keeps its number for as long as it is followed. With `targets` there is also a copy, where frames in between
    repeat what the last classified one shows, and a timeline of the largest face, smoothed. At the end a line with the
    shares of the emotions is printed. Memory does not grow with the length of the video, except for the timeline's
    points. Raises InputError if the copy or the timeline can't be written.
    """
    class_names, course = model.info.class_names, Course(video, every)
    copy = VideoCopy(targets(source, ".faces.mp4"), video.fps, video.size, video) if targets else None
    points, results, is_whole = [], [], False
    try:
        with tqdm(total=video.count or None, desc=printable(source), unit="frames", leave=False, disable=None) as bar:
            for number, seconds, pixels in video:
                bar.update()
                if number % every == 0:
                    course.go_on(seconds)
                    time, found = round(seconds, 3), classify_batch(model, list(find(pixels)))
                    found = [(replace(v, source=source, time=time), to_prediction(p, class_names)) for v, p in found]
                    results = course.add(found)
                    if copy and course.largest:
                        points.append((seconds, *(percent / 100 for percent in course.largest[2].values())))
                    yield from results
                if copy:
                    copy.add(draw_faces(pixels, results, enlarge=False), seconds)
            is_whole = True
    finally:
        if copy:
            copy.close(keep=is_whole)
    course.go_on(video.end)
    (shares, total), is_face = course.shares(), results[0][0].kind in ("face", "none")
    if video.end < 0.98 * video.length - 1:  # it is often an estimate
        print(f"{printable(source)}: {video.end:.1f} of {video.length:.1f} s could be read", file=sys.stderr)
    line = f"{', '.join(shares)} of {total:.1f} s" + " with a face" * is_face
    with contextlib.suppress(BrokenPipeError):  # `| head` has read enough, but files are to be written
        print(f"{printable(source)}: {line if shares else f'no face found in {course.seconds:.1f} s'}")
    if points:
        import reports

        title = f"{Path(source).name}{', largest face' * is_face}: {shares[0]} of the time"
        target = targets(source, ".timeline.png")
        replace_file(target, lambda path: reports.plot_timeline(points, class_names, path, title=title))
