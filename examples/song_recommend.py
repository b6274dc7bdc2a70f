"""A song for your mood: sees the dominant emotion in a camera, an image or a clip, and opens a search for a song.

    python -m examples.song_recommend                           # watches camera 0 for five seconds
    python -m examples.song_recommend --source photo.jpg --service spotify
    python -m examples.song_recommend --source clip.mp4 --no-browser

Songs are listed in examples/songs.toml, a list for every emotion; edit it, or name your own with --songs. Images never
leave your machine: all that is sent is the search for the song, by your browser.
"""

import random
import tomllib
import webbrowser
from pathlib import Path
from urllib.parse import quote

import numpy as np

from console import ArgumentParser, run_script
from errors import InputError, printable
from faces.camera import Camera, watch
from faces.video import Video, is_video
from inference import BUNDLED, classify, load_model, make_finder, to_prediction

SONGS = Path(__file__).with_name("songs.toml")
SERVICES = {
    "youtube": "https://www.youtube.com/results?search_query={}",
    "spotify": "https://open.spotify.com/search/{}",
    "web": "https://duckduckgo.com/?q={}",
}


def read_songs(path: Path, emotions: list[str]) -> dict[str, list[str]]:
    """{emotion: songs}. Raises InputError that names what is wrong with the file, or which emotion has no song."""
    try:
        songs = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read --songs {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--songs {path} is no TOML: {error}") from None
    for emotion, titles in songs.items():
        if not isinstance(titles, list) or not all(isinstance(title, str) and title.strip() for title in titles):
            raise InputError(f'--songs {path}: {emotion} must be a list of songs, as in {emotion} = ["artist - title"]')
    missing = [emotion for emotion in emotions if not songs.get(emotion)]
    if missing:
        raise InputError(f"--songs {path} has no song for {', '.join(missing)}; add one for each")
    return songs


def dominant_emotion(seen, class_names: list[str]) -> tuple[str, float]:
    """The emotion with the highest mean probability of the largest face, and that mean in percent.

    `seen` yields (pixels, [(view, prediction), ...]) as faces.camera.watch does. Raises InputError if there is no face.
    """
    total, frames = np.zeros(len(class_names)), 0
    for _, results in seen:
        if results:
            sizes = [view.face.width * view.face.height if view.face else 0 for view, _ in results]
            _, (_, _, probs) = results[int(np.argmax(sizes))]
            total += [probs[name] for name in class_names]
            frames += 1
    if not frames:
        raise InputError("no face was seen; look into the camera, or pass an image of a face with --source")
    best = int(total.argmax())
    return class_names[best], total[best] / frames


def see(model, class_names: list[str], source: str, seconds: float):
    """What faces.camera.watch yields, of a camera for some seconds, of a clip, or of one image, there without pixels.

    An image of at most 100 pixels is taken for the crop of a face, as predict_emotion.py does.
    """
    if source.isdecimal():
        with Camera(source) as camera:
            yield from watch(model, class_names, camera.for_seconds(seconds), smooth=0.0, detect_every=1)
    elif is_video(source):
        video = Video(source)
        step = max(1, round(video.fps / 5))  # five frames a second are enough
        frames = (pixels for number, _, pixels in video if number % step == 0)
        yield from watch(model, class_names, frames, smooth=0.0, detect_every=1)
    else:
        found = classify(model, [source], make_finder(model.info.input_spec, "auto"))
        yield None, [(view, to_prediction(probs, class_names)) for view, probs in found if probs is not None]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--source", default="0", help="a camera's number, an image or a video file")
    add("--seconds", type=float, default=5.0, help="to watch a camera for")
    add("--songs", metavar="FILE", default=str(SONGS), help="(default: examples/songs.toml)")
    add("--service", choices=SERVICES, default="youtube", help="where to search")
    add("--no-browser", action="store_true", help="print the address instead of opening it")
    add("--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        raise InputError(f"--seconds must be above 0, not {args.seconds:g}")
    model, class_names = load_model(args.checkpoint)
    songs = read_songs(Path(args.songs), class_names)
    print("Your images stay on this machine; only the search for a song is sent, by your browser.")
    if args.source.isdecimal():
        print(f"Look into camera {args.source} for {args.seconds:g} seconds ...", flush=True)
    emotion, confidence = dominant_emotion(see(model, class_names, args.source, args.seconds), class_names)
    song = random.choice(songs[emotion])
    address = SERVICES[args.service].format(quote(song, safe=""))
    print(f"You look {emotion} ({confidence:.0f}%). A song for that: {printable(song)}\n{address}")
    if not args.no_browser and not webbrowser.open(address):
        print("no browser could be opened; the address stands above")


if __name__ == "__main__":
    run_script(main)
