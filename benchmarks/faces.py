"""How FER2013's images are framed, as the detector sees it, and what finding faces costs next to classifying them.

    python -m benchmarks.faces --data-dir fer2013
    python -m benchmarks.faces --data-dir fer2013 --yunet face_detection_yunet.onnx

Framing: images of train/ are put into a larger one (their edges repeated), searched, and their side compared with the
box that is found. Half of what it is longer is the margin that crop_face adds on each side (faces/detector.py).

Speed: a frame of 640 x 480 and a photo of 12 megapixels, both with the face of the photo in them, detector and model
timed apart, medians.
"""

import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import REPO, check_inputs
from benchmarks.prediction_speed import median_ms
from console import ArgumentParser, number, run_script
from data import walk_images
from errors import InputError
from faces.detector import crop_face, find_faces
from inference import BUNDLED, load_model, predict_image
from preprocessing import read_whole

PHOTO = REPO / "examples" / "astronaut.jpg"


def describe_framing(folder: Path, count: int, yunet: str | None) -> str:
    paths = [entry.path for entry in walk_images(folder)]
    chosen = np.random.default_rng(0).permutation(len(paths))[:count]
    ratios = []  # of an image's side to the longer side of the face found in it
    for index in chosen:
        pixels = read_whole(paths[index])
        side, pad = len(pixels), len(pixels) // 3
        padded = Image.fromarray(np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
        enlarged = padded.resize((3 * padded.width, 3 * padded.height), Image.Resampling.BICUBIC)
        found = find_faces(enlarged, min_size=2 * side, yunet=yunet)
        if found:
            ratios.append(3 * side / max(found[0].width, found[0].height))
    if not ratios:
        raise InputError(f"no face was found in {len(chosen)} images of {folder}")
    median = statistics.median(ratios)
    return (
        f"faces found in {len(ratios)} of {len(chosen)} images; image / box: median {median:.3f}, margin "
        f"{(median - 1) / 2:.3f}"
    )


def describe_speed(photo: Image.Image, checkpoint: str | None, rounds: int, yunet: str | None) -> list[str]:
    model, class_names = load_model(checkpoint, "cpu")
    lines = []
    for name, size in (("frame of 640 x 480", (640, 480)), ("photo of 12 megapixels", (4000, 3000))):
        side = min(size)
        image = Image.new("RGB", size, "gray")
        image.paste(photo.resize((side, side)), ((size[0] - side) // 2, 0))
        pixels = np.asarray(image)
        found = find_faces(pixels, yunet=yunet)
        if not found:
            raise InputError("no face is found in the photo; pass another --photo")
        crop = crop_face(pixels, found[0])
        finding = median_ms(lambda pixels=pixels: find_faces(pixels, yunet=yunet), rounds)
        classifying = median_ms(lambda crop=crop: predict_image(model, crop, class_names), rounds)
        lines.append(f"| {name} | {finding:.1f} ms | {classifying:.1f} ms |")
    return lines


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="its train/ is searched")
    add("--photo", metavar="FILE", default=str(PHOTO), help="of a face (default: examples/astronaut.jpg)")
    add("--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)")
    add("--images", type=number(int, 1), default=1000, help="to measure framing on")
    add("--rounds", type=number(int, 1), default=30, help="the median is printed")
    add("--yunet", metavar="FILE", help="YuNet's .onnx file, instead of the cascade")
    args = parser.parse_args()
    folder = check_inputs(args.data_dir)["train"]
    print(describe_framing(folder, args.images, args.yunet), flush=True)
    print("\n| image | finding faces | classifying a face |\n| --- | --- | --- |")
    print("\n".join(describe_speed(Image.fromarray(read_whole(args.photo)), args.checkpoint, args.rounds, args.yunet)))


if __name__ == "__main__":
    run_script(main)
