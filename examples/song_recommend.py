"""A song for your mood: sees the dominant emotion in a camera, a picture or a clip, and opens a search for a song.

    python -m examples.song_recommend                           # watches camera 0 for five seconds
    python -m examples.song_recommend --source photo.jpg --service spotify
    python -m examples.song_recommend --source clip.mp4 --no-browser

Songs stand in examples/songs.toml, a list for every emotion; edit it, or name your own with --songs. Pictures never
leave your machine: all that is sent is the search for the song, by your browser.
"""

import random
import tomllib
import webbrowser
from pathlib import Path
from urllib.parse import quote

import numpy as np

from console import ArgumentParser, run_script
from decoding import read_whole
from live import Camera, watch
from models import InputError, printable
from predict_emotion import load_model
from video import Video, is_video

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

    `seen` yields (pixels, [(face, prediction), ...]) as live.watch does. Raises InputError where it shows no face.
    """
    total, frames = np.zeros(len(class_names)), 0
    for _, results in seen:
        if results:
            _, (_, _, probs) = max(results, key=lambda result: result[0].width * result[0].height)
            total += [probs[name] for name in class_names]
            frames += 1
    if not frames:
        raise InputError("no face was seen; look into the camera, or pass a picture of a face with --source")
    best = int(total.argmax())
    return class_names[best], total[best] / frames


def look(source: str, seconds: float):
    """Frames of a camera for so many seconds, of a clip in their order, or the one picture."""
    if source.isdecimal():
        camera = Camera(source)
        try:
            yield from camera.for_seconds(seconds)
        finally:
            camera.close()
    elif is_video(source):
        video = Video(source)
        for number, _, pixels in video:
            if number % max(1, round(video.fps / 5)) == 0:  # five a second are enough
                yield pixels
    else:
        yield read_whole(source)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="0", help="a camera's number, a picture or a video file (default: 0)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to watch a camera for (default: 5)")
    parser.add_argument("--songs", metavar="FILE", default=str(SONGS), help="(default: examples/songs.toml)")
    parser.add_argument("--service", choices=SERVICES, default="youtube", help="where to search (default: youtube)")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    parser.add_argument("--checkpoint", metavar="PATH", help="(default: best_emotion_model.pth here, else "
                        "weights/emotion_model.pth)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        raise InputError(f"--seconds must be above 0, not {args.seconds:g}")
    model, class_names = load_model(args.checkpoint)
    songs = read_songs(Path(args.songs), class_names)
    print("Your pictures stay on this machine; only the search for a song is sent, by your browser.")
    if args.source.isdecimal():
        print(f"Look into camera {args.source} for {args.seconds:g} seconds ...", flush=True)
    frames = look(args.source, args.seconds)
    emotion, confidence = dominant_emotion(watch(model, class_names, frames, smooth=0.0, detect_every=1), class_names)
    song = random.choice(songs[emotion])
    address = SERVICES[args.service].format(quote(song, safe=""))
    print(f"You look {emotion} ({confidence:.0f}%). A song for that: {printable(song)}\n{address}")
    if not args.no_browser and not webbrowser.open(address):
        print("no browser could be opened; the address stands above")


if __name__ == "__main__":
    run_script(main)
