"""A web page on this computer: drop a photo or use the webcam, and see the emotion of every face in it.

    python -m examples.web_demo                     # http://127.0.0.1:7860
    python -m examples.web_demo --checkpoint best_emotion_model.pth --port 8000

Only this computer can open the page, unless --host lets others in. Images are sent nowhere else, and what the server
keeps of them while it runs is deleted when it ends. Needs Gradio: pip install "gradio>=6".
"""

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path

from console import ArgumentParser, number, run_script
from data import walk_images
from errors import InputError, printable
from faces.overlay import draw_faces
from inference import BUNDLED, View, classify, load_model, make_finder, to_prediction
from models import count_parameters
from preprocessing import read_whole

PHOTO = Path(__file__).parent / "astronaut.jpg"
DRAWINGS = Path(__file__).parent.parent / "test"
PRIVACY = "Images are not sent anywhere but to the program that shows this page."


def load_gradio():
    """The module gradio, which then sends no statistics and records no runs; InputError if it is missing."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio
    except ImportError as error:
        raise InputError(f'the page needs Gradio: pip install "gradio>=6" ({error})') from None
    return gradio


def describe(model, path: str) -> str:
    info, count = model.info, count_parameters(model)
    size = f"{count:,} parameters" if count else "exported"
    classes = ", ".join(map(printable, info.class_names))
    return f"{info.arch} from {printable(path)}, {size}, trained on {printable(info.trained_on)}. Classes: {classes}."


def find_emotions(model, path: str) -> tuple[list[tuple[View, tuple | None]], str]:
    """([(view, prediction) for each face of the image], a line on what was found)."""
    found = classify(model, [path], make_finder(model.info.input_spec, "auto"))
    results = [(view, to_prediction(probs, model.info.class_names)) for view, probs in found]
    message = {
        "crop": "The image is small, so all of it was taken for one face.",
        "none": "No face found. Try an image in which a face is larger, or crop it to the face.",
        "face": "1 face found." if len(results) == 1 else f"{len(results)} faces found.",
    }
    return results, message[results[0][0].kind]


def build_page(gr, model, path: str):
    """The page, as gradio.Blocks."""

    drawings = [entry.path for folder in sorted(DRAWINGS.glob("*/")) for entry in walk_images(folder)[:1]]
    examples = [path for path in [str(PHOTO), *drawings] if os.path.isfile(path)]
    uploads = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()

    def classify(photo):  # a path, or the pixels of an example
        if photo is None:
            return None, "", []
        try:
            if isinstance(photo, str) and not Path(photo).resolve().is_relative_to(uploads):
                raise InputError("a request may name any file of this computer")
            results, message = find_emotions(model, photo)
        except InputError:
            return None, "This file can't be read as an image. Try a JPEG or PNG file.", []
        labels = [{name: percent / 100 for name, percent in found[2].items()} for _, found in results if found]
        return draw_faces(read_whole(photo), results), message, labels

    with gr.Blocks(title="Facial emotions", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown(f"# Facial emotions\n{PRIVACY}")
        gr.Textbox(describe(model, path), label="Model", interactive=False)  # no Markdown: names are text
        with gr.Row():
            with gr.Column():
                photo = gr.Image(sources=["upload", "webcam", "clipboard"], label="Photo", height=400)
                photo.preprocess = lambda file: file and file.path  # so that we read it, as everywhere else
                gr.Examples(examples, photo, examples_per_page=8)
            with gr.Column():
                buttons = ["download", "fullscreen"]  # none that shares
                annotated = gr.Image(label="Faces", interactive=False, format="jpeg", height=400, buttons=buttons)
                message = gr.Markdown(elem_id="message")
                labels = gr.State([])

                @gr.render(inputs=labels)
                def show_labels(found: list[dict[str, float]]) -> None:
                    for number, probs in enumerate(found, 1):
                        gr.Label(probs, label=f"Face {number}")

        photo.change(classify, photo, [annotated, message, labels], api_name="classify")
    return page


def find_port(host: str, wanted: int | None) -> int:
    """`wanted`, or the first free one from 7860 on. InputError if it is taken or `host` is wrong."""
    for port in [wanted] if wanted is not None else range(7860, 7960):
        with socket.socket() as server:
            if os.name == "posix":  # where it allows a port that was used a moment ago; elsewhere one in use
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, port))
                return port
            except OSError as error:
                problem = f"can't serve at --host {host} --port {port}: {error.strerror}"
    raise InputError(problem)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", default=str(BUNDLED), help="(default: weights/emotion_model.pth)")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other computers in")
    add("--port", type=number(int, 1, 65535), help="(default: the first free one from 7860 on)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    port = find_port(args.host, args.port)
    gr = load_gradio()
    model, _ = load_model(args.checkpoint, args.device)
    ended = threading.Event()  # an exception raised by a signal may be lost in a callback that ignores it; this can't
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a closed terminal, a shutdown: the images are deleted then too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="emotion_page_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(gr, model, os.path.basename(args.checkpoint))
        quiet = dict(
            share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True, footer_links=[], max_file_size="20mb"
        )
        page.launch(server_name=args.host, server_port=port, **quiet)
        print(f"open http://{args.host}:{port} in a browser; Ctrl-C ends", flush=True)
        while not ended.wait(0.2):  # on Windows a wait without end hears no Ctrl-C
            pass
        page.close(verbose=False)


if __name__ == "__main__":
    run_script(main)
