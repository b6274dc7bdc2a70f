"""What train_emotion_cnn.py refuses: one line that names the flag or file, exit code 2, and nothing lost."""

import os
import shutil
import sys

import pytest
import torch
from conftest import SMALL, assert_refused, draw_folder, run_as_user, run_process, start
from test_train import load

from checkpoints import BEST_NAME, FINAL_NAME
from train_emotion_cnn import main


@pytest.fixture
def command(trained, tmp_path):
    places = ["--data-dir", trained, "--cache-dir", trained / "cache", "--output-dir", tmp_path / "out"]
    return [*map(str, places), "--arch", "cnn4_bn", "--epochs", "1"]


NAMED = [  # the line has their words
    *("--epochs 0", "--epochs many", "--lr nan", "--dropout 1", "--val-fraction 2", "--image-size 8", "--batch-size 1"),
    *("--optimizer lion", "--no-such-flag", "--epoch", "--augment rotation", "--device warp"),
    *("--device cuda:99", "--device meta", "--precision fp16 --device cpu"),
    *("--weights none.pth", "--teacher none.pth", "--output-dir {tmp}/text.pth", "--output-dir {tmp}/text.pth/below"),
    *("--tensorboard {tmp}/text.pth",),
]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        *((args, args.removesuffix(" --device cpu")) for args in NAMED),
        ("--arch cnn9", "cnn9 cnn4_bn mobilenet_v2"),
        ("--freeze all", "--freeze cnn4_bn"),
        ("--augment blur=3", "--augment blur"),
        ("--augment flip=2", "--augment flip"),
        ("--augment window=0.8", "--augment window cnn4_bn"),
        ("--pretrained", "--pretrained cnn4_bn"),
        ("--arch mobilenet_v2", "mobilenet_v2 --weights --no-pretrained"),  # there is no network in this test
        ("--arch mobilenet_v2 --no-pretrained --freeze features.9", "--freeze --no-pretrained"),
        ("--arch mobilenet_v2 --pretrained --weights {best}", "--pretrained --weights"),
        ("--weights=", "--weights"),  # "$WEIGHTS" of a shell without it
        ("--weights {tmp}/text.pth", "text.pth"),
        ("--weights {tmp}/foreign.pth", "foreign.pth cnn4_bn"),
        ("--weights {best} --arch cnn4", "{best} cnn4_bn"),
        ("--teacher {best} --data-dir {tmp}/other", "--teacher {best} class_names laugh"),
        ("--teacher {best} --arch cnn6_rgb", "--teacher {best} input_spec"),
        ("--teacher {best} --arch seresnet13", "--teacher {best} cnn4_bn window"),
        ("--teacher {best} --output-dir {out}", "--teacher {best} --output-dir"),
        ("--resume", "--resume {tmp}/out first"),
        ("--resume {tmp}/text.pth", "text.pth"),
        ("--data-dir {tmp}/none", "{tmp}/none --data-dir"),
        ("--data-dir {tmp}/other/train", "train/train --data-dir"),
        ("--data-dir {tmp}/empty", "{tmp}/empty/train"),
        ("--data-dir {tmp}/one", "{tmp}/one/train happy"),
        ("--data-dir {tmp}/few", "2 {tmp}/few/train"),
        ("--data-dir {tmp}/broken", "{tmp}/broken/train/sad bad.png"),
        ("--data-dir {tmp}/strict --strict", "bad.png --strict"),
        ("--data-dir {tmp}/unknown", "{tmp}/unknown/test zeal laugh weep"),
    ],
)
def test_mistakes(args, words, trained, command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"0.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for name in ("other", "broken", "strict", "unknown"):
        draw_folder(tmp_path / name / "train", {"laugh": 3, "weep": 3})
    draw_folder(tmp_path / "one" / "train", {"happy": 3})
    draw_folder(tmp_path / "few" / "train", {"happy": 1, "sad": 1})
    draw_folder(tmp_path / "unknown" / "test", {"zeal": 1})
    for name in ("broken/train/sad", "strict/train/weep"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "bad.png").write_bytes(b"no image")
    places = {"tmp": tmp_path, "out": trained / "out", "best": trained / "out" / BEST_NAME}
    before = (trained / "out" / BEST_NAME).read_bytes()
    assert_refused(main, [*command, *args.format(**places).split()], *words.format(**places).split())
    assert not (tmp_path / "out" / BEST_NAME).exists() and (trained / "out" / BEST_NAME).read_bytes() == before


@pytest.mark.parametrize("batch_size", [16, 500])
def test_a_loss_that_becomes_nan_keeps_the_checkpoints(batch_size, trained, command, tmp_path):
    """With all images in one batch the loss is fine and the update is not: only validation can see it."""
    shutil.copytree(trained / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    args = ["--optimizer", "sgd", "--lr", "1e38", "--batch-size", batch_size]
    assert_refused(main, [*command, *args], "epoch 1/1: the loss became", "--lr", "--clip-grad")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_missing_permissions_are_one_line():
    """As an ordinary user, for whom permissions count."""
    out = run_as_user("""
        import sys, threading, time
        from pathlib import Path

        sys.path += [os.environ["PYTHONPATH"], os.path.join(os.environ["PYTHONPATH"], "tests")]
        from checkpoints import read_checkpoint
        from conftest import SMALL, draw_folder, run
        from train_emotion_cnn import main

        def attempt(*args):
            code, _, err = run(main, "--data-dir", ".", *SMALL, "--epochs", "1", "--device", "cpu", *args)
            print(code, err, end="", flush=True)

        draw_folder("train", {"angry": 4, "happy": 4})
        draw_folder("shut/train", {"angry": 4, "happy": 4})
        Path("shut/train/happy").chmod(0)
        Path("closed").mkdir(mode=0o555)
        Path("open").mkdir()
        Path("open").chmod(0o777)
        attempt("--output-dir", "warm")  # imports all that is imported late: the user may not be let to Python's files
        become_user()
        print()
        attempt("--output-dir", "closed")
        attempt("--output-dir", "closed/below")
        attempt("--output-dir", "open", "--data-dir", "shut")

        def shut():
            while not os.path.exists("open/own/final_emotion_model.pth"):
                time.sleep(0.01)
            os.chmod("open/own", 0o555)

        threading.Thread(target=shut, daemon=True).start()
        attempt("--output-dir", "open/own", "--epochs", "1000")
        for name in ("best", "final"):
            print("whole", read_checkpoint(f"open/own/{name}_emotion_model.pth")["epoch"], flush=True)
        print(os.listdir("closed"), os.listdir("open"), flush=True)
    """)
    first, *lines = out.splitlines()
    errors = ("--output-dir closed", "closed/below", "shut/train/happy", "can't write open/own")  # the last in the end
    assert first.strip() == "0" and len(lines) == len(errors) + 3
    for line, words in zip(lines, errors, strict=False):
        assert line.startswith("2 error: ") and words in line
    assert [line[:6] for line in lines[4:6]] == ["whole "] * 2 and lines[-1] == "[] ['own']"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory with ulimit")
def test_out_of_memory_names_the_flag(command):
    args = ["--arch", "cnn6_bn", "--image-size", 1024, "--batch-size", 36, "--device", "cpu", "--precision", "fp32"]
    code, _, err = run_process(main, *command, *args, ulimit="-v 9000000")
    assert code == 2 and err.startswith("error: out of memory; lower --batch-size"), err


@pytest.mark.skipif(os.name != "posix", reason="limits files with ulimit")
def test_disk_full_while_saving_keeps_the_last_checkpoint(trained, command, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def run_on_full_disk(main, *args):
        return run_process(main, *args, ulimit="-f 2000")

    args = [*command, *SMALL, "--epochs", 3, "--resume"]
    assert_refused(main, args, "can't write", "emotion_model.pth", run=run_on_full_disk)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="moves a folder that is in use")
def test_output_folder_removed_while_running(command, tmp_path):
    process = start(main, *command, "--epochs", 1000)
    assert any(line.startswith("epoch 2/") for line in process.stdout)
    os.rename(tmp_path / "out", tmp_path / "elsewhere")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: can't write") and err.count("\n") == 1, err
    for name in (BEST_NAME, FINAL_NAME):
        load(tmp_path / "elsewhere" / name)
