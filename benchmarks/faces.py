"""How many faces are found, upright and tilted, how well they are then classified, and how long finding takes.

    python -m benchmarks.faces --data-dir fer2013
    python -m benchmarks.faces --data-dir fer2013 --onnx face_detection_yunet_2023mar.onnx

Images of val/ are enlarged to 240 pixels, given a border of 120 that repeats their edges, and turned; "full" are the
same enlarged to 480 pixels without a border. A cell is the share of faces that are found, and the accuracy of the
model on what is cut out (no face found counts as wrong). Our crops are turned upright; those of OpenCV's detectors are
the square around the box. The time is for an image of 1280 x 720 pixels with one face, on one thread, a median.
OpenCV's detectors are measured if it is installed: the cascade of version 4, and FaceDetectorYN with --onnx.
"""

import cmath
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks import REPO, check_inputs
from benchmarks.prediction_speed import median_ms
from console import ArgumentParser, number, run_script
from data import list_images
from faces.align import align_face, cut_square
from faces.detector import find_faces
from inference import BUNDLED, load_model, predict_images
from preprocessing import read_whole

PHOTO = REPO / "examples" / "astronaut.jpg"
TILTS = (0, 15, 30, 45, 60)

Cutter = Callable[[np.ndarray], np.ndarray | None]  # an image -> its largest face


def cut_face(pixels: np.ndarray) -> np.ndarray | None:
    faces = find_faces(pixels)
    return align_face(pixels, faces[0]) if faces else None


def cut_face_box(pixels: np.ndarray) -> np.ndarray | None:
    return cut_box(pixels, np.array([face.box for face in find_faces(pixels)]))


def cut_box(pixels: np.ndarray, boxes: np.ndarray | None) -> np.ndarray | None:
    if boxes is None or not len(boxes):
        return None
    left, top, width, height = max(boxes, key=lambda box: box[2] * box[3])[:4]
    side = max(1, round(max(width, height)))
    return cut_square(pixels, left + width / 2 + 1j * (top + height / 2), 1 + 0j, side)


def find_cutters(onnx: str | None) -> dict[str, Cutter]:
    cutters: dict[str, Cutter] = {"faces/detector.py": cut_face, "the same, not turned": cut_face_box}
    try:
        import cv2
    except ImportError:
        return cutters
    cv2.setNumThreads(1)
    if hasattr(cv2, "CascadeClassifier"):
        cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")

        def cut_with_cascade(pixels: np.ndarray) -> np.ndarray | None:
            gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
            return cut_box(pixels, cascade.detectMultiScale(gray, 1.1, 5, minSize=(30, 30)))

        cutters["OpenCV's cascade"] = cut_with_cascade
    if onnx:
        yunet = cv2.FaceDetectorYN.create(onnx, "", (320, 320), 0.7)

        def cut_with_yunet(pixels: np.ndarray) -> np.ndarray | None:
            yunet.setInputSize(pixels.shape[1::-1])
            return cut_box(pixels, yunet.detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1])

        cutters["OpenCV's FaceDetectorYN"] = cut_with_yunet
    return cutters


def turn(path: str, tilt: int | None) -> np.ndarray:
    """The image enlarged, and with a border and turned clockwise by `tilt` degrees unless it is None."""
    image, side = Image.fromarray(read_whole(path)), 240 if tilt is not None else 480
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    if tilt is None:
        return np.asarray(image)
    pixels = np.pad(np.asarray(image), ((side, side), (side, side), (0, 0)), mode="edge")
    return cut_square(pixels, len(pixels) / 2 * (1 + 1j), cmath.rect(1, -np.radians(tilt)), 2 * side)


def measure(cut: Cutter, images: list, tilt: int | None, model) -> str:
    """ "found / accuracy", in percent."""
    crops = [(cut(turn(image.path, tilt)), model.info.class_names[image.label]) for image in images]
    found = [(crop, name) for crop, name in crops if crop is not None]
    predicted = predict_images(model, [crop for crop, _ in found], faces="off")
    right = sum(emotion == name for (emotion, _, _), (_, name) in zip(predicted, found, strict=True))
    return f"{100 * len(found) / len(images):.1f} / {100 * right / len(images):.1f}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="its val/ is searched")
    add("--onnx", metavar="FILE", help="YuNet's .onnx file, to measure OpenCV's FaceDetectorYN with")
    add("--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)")
    add("--images", type=number(int, 1), default=500, help="of val/, at random")
    add("--rounds", type=number(int, 1), default=30, help="the median is printed")
    args = parser.parse_args()
    model, class_names = load_model(args.checkpoint, "cpu")
    images = list_images(check_inputs(args.data_dir, splits=("val",))["val"], class_names)
    images = [images[index] for index in np.random.default_rng(0).permutation(len(images))[: args.images]]
    frame = Image.new("RGB", (1280, 720), "gray")
    frame.paste(Image.open(PHOTO).resize((720, 720)), (280, 0))
    print(f"| detector | ms | full | {' | '.join(f'{tilt}°' for tilt in TILTS)} |\n|{' --- |' * (3 + len(TILTS))}")
    for name, cut in find_cutters(args.onnx).items():
        cells = [measure(cut, images, tilt, model) for tilt in (None, *TILTS)]
        torch.set_num_threads(1)
        time = median_ms(lambda cut=cut: cut(np.asarray(frame)), args.rounds)
        print(f"| {name} | {time:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
