"""Faces followed from frame to frame, each with a number of its own and smoothed probabilities.

Example::

    tracker.detect(find_faces(pixels, turns=False))
    tracker.classify(predictions)                       # one for each of tracker.found
    shown = [(track.number, track.face, track.prediction) for track in tracker.found]
"""

from dataclasses import dataclass

from faces.align import Face
from inference import Prediction


@dataclass
class Track:
    """A face that is followed: its number, where it was last, its smoothed probabilities in percent, how often it was
    missed."""

    number: int
    face: Face
    probs: dict[str, float] | None = None
    missed: int = 0

    @property
    def prediction(self) -> Prediction:
        best = max(self.probs, key=self.probs.get)
        return best, self.probs[best], self.probs


class Tracker:
    """Follows faces from one detection to the next and smooths each one's probabilities exponentially.

    `smooth` is the weight of the past at each frame (0 turns smoothing off); a face missed by `patience` detections in
    a row is dropped. A found face continues the nearest track if their centers are less than half the larger one's
    width apart; else it gets the next number, from 1 on.
    """

    def __init__(self, smooth: float = 0.7, patience: int = 3):
        self.smooth, self.patience, self.tracks, self.count = smooth, patience, [], 0

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
        new = [face for f, face in enumerate(found) if f not in placed]
        self.tracks += [Track(number, face) for number, face in enumerate(new, self.count + 1)]
        self.count += len(new)

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
    return abs(one.center - other.center) / max(one.width, other.width)
