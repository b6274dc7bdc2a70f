"""How FER2013's pictures are framed, as the detector sees it, and what finding faces costs beside naming emotions.

    python -m benchmarks.faces --data-dir fer2013
    python -m benchmarks.faces --data-dir fer2013 --yunet face_detection_yunet.onnx

Framing: pictures of train/ are put into a larger one (their edges repeated), searched, and their side compared with
the box that is found. Half of what it is longer is the margin that crop_face adds on each side.

Speed: a frame of 640 x 480 and a photo of 12 megapixels, both with the face of the photo in them, detector and network
timed apart, medians.
"""

import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import check_inputs, count
from benchmarks.prediction_speed import median_ms
from console import ArgumentParser, run_script
from data import walk_pictures
from errors import InputError
from faces.detector import crop_face, find_faces
from inference import BUNDLED, load_model, predict_image
from preprocessing import read_whole

PHOTO = Path(__file__).parent.parent / "examples" / "astronaut.jpg"


def describe_framing(data_dir: str, pictures: int, yunet: str | None) -> str:
    paths = sorted(entry.path for entry in walk_pictures(Path(data_dir) / "train"))
    chosen = np.random.default_rng(0).permutation(len(paths))[:pictures]
    shares, shifts = [], []
    for index in chosen:
        pixels = read_whole(paths[index])
        side, pad = len(pixels), len(pixels) // 3
        padded = Image.fromarray(np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
        found = find_faces(
            padded.resize((3 * padded.width, 3 * padded.height), Image.Resampling.BICUBIC),
            min_size=2 * side,
            yunet=yunet,
        )
        if found:
            width, height = found[0].width / 3, found[0].height / 3
            shares.append(side / max(width, height))
            shifts.append((pad + side / 2 - found[0].top / 3 - height / 2) / max(width, height))
    if not shares:
        raise InputError(f"no face was found in {len(chosen)} pictures of {data_dir}/train")
    median, shift = statistics.median(shares), statistics.median(shifts)
    low, high = np.percentile(shares, (25, 75))
    return (
        f"faces found in {len(shares)} of {len(chosen)} pictures; picture / box: median {median:.3f} (quartiles "
        f"{low:.2f} to {high:.2f}), middle {shift:+.3f} of a box lower; margin {(median - 1) / 2:.3f}"
    )


def describe_speed(photo: Image.Image, checkpoint: str | None, rounds: int, yunet: str | None) -> list[str]:
    model, class_names = load_model(checkpoint, "cpu")
    lines = []
    for name, size in (("frame of 640 x 480", (640, 480)), ("photo of 12 megapixels", (4000, 3000))):
        side = min(size)
        picture = Image.new("RGB", size, "gray")
        picture.paste(photo.resize((side, side)), ((size[0] - side) // 2, 0))
        pixels = np.asarray(picture)
        found = find_faces(pixels, yunet=yunet)
        if not found:
            raise InputError("no face is found in the photo; pass another --photo")
        crop = crop_face(pixels, found[0])
        finding = median_ms(lambda pixels=pixels: find_faces(pixels, yunet=yunet), rounds)
        naming = median_ms(lambda crop=crop: predict_image(model, crop, class_names), rounds)
        lines.append(f"| {name} | {finding:.1f} ms | {naming:.1f} ms |")
    return lines


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="its train/ is searched (default: .)")
    parser.add_argument(
        "--photo", metavar="FILE", default=str(PHOTO), help="a picture of a face (default: examples/astronaut.jpg)"
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)"
    )
    parser.add_argument("--pictures", type=count, default=1000, help="to measure framing on (default: 1000)")
    parser.add_argument("--rounds", type=count, default=30, help="(default: 30)")
    parser.add_argument("--yunet", metavar="FILE", help="YuNet's .onnx file, in the place of the cascade")
    args = parser.parse_args()
    check_inputs(args.data_dir)
    print(describe_framing(args.data_dir, args.pictures, args.yunet), flush=True)
    print("\n| picture | finding faces | naming an emotion |\n| --- | --- | --- |")
    print("\n".join(describe_speed(Image.fromarray(read_whole(args.photo)), args.checkpoint, args.rounds, args.yunet)))


if __name__ == "__main__":
    run_script(main)
