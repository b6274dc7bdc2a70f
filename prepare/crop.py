"""Photos -> the largest face of each, framed as predictions see it."""

import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import describe_others, walk_images
from errors import InputError, printable
from inference import crop_largest_face


def crop_photos(source: Path, folder: Path, min_size: int | None = None) -> tuple[int, int]:
    """Writes the largest face of each photo below `source` to the same place in `folder`, as PNG; gray stays gray.

    Returns (number of faces, number of photos). Photos without a face or that can't be read are named on standard
    error and left out. Raises InputError if no face is left, and OSError.
    """
    photos, kept = [Path(entry.path) for entry in walk_images(source)], []
    if not photos:
        held = describe_others(source) or "no files"
        raise InputError(f"{source} holds no images ({held}); name the folder of your photos")
    for photo in tqdm(photos, unit="photo", leave=False, disable=None):
        try:
            face = crop_largest_face(photo, min_size)
        except InputError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        place, number = folder / photo.relative_to(source).with_suffix(".png"), 1
        place.parent.mkdir(parents=True, exist_ok=True)
        while place.exists():  # photo.jpg next to photo.png
            number += 1
            place = place.with_name(f"{photo.stem}-{number}.png")
        Image.fromarray(face[..., 0] if (face == face[..., :1]).all() else face).save(place)
        kept.append(photo)
    if not kept:
        raise InputError(f"none of the {len(photos):,} images in {source} shows a face that is found")
    for parent in sorted({photo.parent for photo in photos} - {photo.parent for photo in kept}):
        print(f"warning: no image in {printable(parent)} shows a face that is found", file=sys.stderr)
    return len(kept), len(photos)
