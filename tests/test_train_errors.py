"""What train_emotion_cnn.py refuses: one line that names the flag or file, exit code 2, and nothing lost."""

import os
import shutil
import sys

import pytest
from conftest import SMALL, assert_refused, draw_folder, run_as_user, run_process
from test_train import read_files

from checkpoints import BEST_NAME
from train_emotion_cnn import main


@pytest.fixture
def command(trained, tmp_path):
    places = ["--data-dir", trained, "--cache-dir", trained / "cache", "--output-dir", tmp_path / "out"]
    return [*map(str, places), "--arch", "cnn4_bn", "--epochs", "1"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of what is wrong, each in its own way."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "text.pth").write_text("no checkpoint")
    for name in ("other", "strict"):
        draw_folder(bad / name / "train", {"laugh": 3, "weep": 3})
    (bad / "strict" / "train" / "weep" / "bad.png").write_bytes(b"no image")
    return bad


NAMED = [  # the line has their words
    *("--epochs 0", "--ema 1", "--lr nan", "--dropout 1", "--val-fraction 2", "--image-size 8", "--batch-size 1"),
    *("--optimizer lion", "--epoch", "--augment rotation", "--device warp", "--weights none.pth", "--teacher none.pth"),
    *("--output-dir {bad}/text.pth", "--output-dir {bad}/text.pth/below", "--tensorboard {bad}/text.pth"),
]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        *zip(NAMED, NAMED, strict=True),
        ("--precision fp16 --device cpu", "--precision fp16"),
        ("--arch cnn9", "cnn9 cnn4_bn mobilenet_v2"),
        ("--freeze all", "--freeze cnn4_bn"),
        ("--augment window=0.8", "--augment window cnn4_bn"),
        ("--pretrained", "--pretrained cnn4_bn"),
        ("--arch mobilenet_v2", "mobilenet_v2 --weights --no-pretrained"),  # there is no network in this test
        ("--arch mobilenet_v2 --no-pretrained --freeze features.9", "--freeze --no-pretrained"),
        ("--arch mobilenet_v2 --pretrained --weights {best}", "--pretrained --weights"),
        ("--weights=", "--weights"),  # "$WEIGHTS" of a shell without it
        ("--weights {best} --arch cnn4", "{best} cnn4_bn"),
        ("--teacher {best} --data-dir {bad}/other", "--teacher {best} class_names laugh"),
        ("--teacher {best} --arch cnn6_rgb", "--teacher {best} input_spec"),
        ("--teacher {best} --arch seresnet13", "--teacher {best} cnn4_bn window"),
        ("--teacher {best} --output-dir {out}", "--teacher {best} --output-dir"),
        ("--data-dir {bad}/none", "{bad}/none --data-dir"),
        ("--data-dir {bad}/other/train", "train/train --data-dir"),
        ("--data-dir {bad}/strict --strict", "bad.png --strict"),
    ],
)
def test_mistakes(args, words, trained, bad, command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    places = {"bad": bad, "out": trained / "out", "best": trained / "out" / BEST_NAME}
    before = read_files(trained / "out")
    assert_refused(main, [*command, *args.format(**places).split()], *words.format(**places).split())
    assert not (tmp_path / "out" / BEST_NAME).exists() and read_files(trained / "out") == before


@pytest.mark.parametrize("batch_size", [16, 500])
def test_a_loss_that_becomes_nan_keeps_the_checkpoints(batch_size, trained, command, tmp_path):
    """With all images in one batch the loss is fine and the update is not: only validation can see it."""
    shutil.copytree(trained / "out", tmp_path / "out")
    args = ["--optimizer", "sgd", "--lr", "1e38", "--batch-size", batch_size]
    assert_refused(main, [*command, *args], "epoch 1/1: the loss became", "--lr", "--clip-grad")
    assert read_files(tmp_path / "out") == read_files(trained / "out")


def test_missing_permissions_are_one_line():
    """As an ordinary user, for whom permissions count."""
    out = run_as_user("""
        from pathlib import Path
        from tests.conftest import SMALL, draw_folder, run
        from train_emotion_cnn import main

        def attempt(*args):
            code, _, err = run(main, "--data-dir", ".", *SMALL, "--epochs", "1", "--device", "cpu", *args)
            print(code, err.strip())

        draw_folder("train", {"angry": 4, "happy": 4})
        draw_folder("shut/train", {"angry": 4, "happy": 4})
        Path("closed").mkdir(mode=0o555)
        attempt("--output-dir", "warm")  # imports all that is imported late: the user may not be let to Python's files
        Path("shut/train/happy").chmod(0)
        Path("warm/best_emotion_model.pth").chmod(0)
        become_user()
        attempt("--output-dir", "closed")
        attempt("--output-dir", "closed/below")
        attempt("--output-dir", ".", "--data-dir", "shut")
        attempt("--output-dir", ".", "--weights", "warm/best_emotion_model.pth")
        print(os.listdir("closed"))
    """)
    first, *lines, last = out.splitlines()
    assert first.strip() == "0" and all(line.startswith("2 error: ") for line in lines) and last == "[]"
    named = ("--output-dir closed", "closed/below", "shut/train/happy", "no permission to read warm/best")
    assert [words for words, line in zip(named, lines, strict=True) if words not in line] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory with ulimit")
def test_out_of_memory_names_the_flag(command):
    args = ["--arch", "cnn6_bn", "--image-size", 1024, "--batch-size", 36, "--device", "cpu", "--precision", "fp32"]
    code, _, err = run_process(main, *command, *args, ulimit="-v 9000000")
    assert code == 2 and err.startswith("error: out of memory; lower --batch-size"), err


@pytest.mark.skipif(os.name != "posix", reason="limits files with ulimit")
@pytest.mark.parametrize(("megabytes", "args"), [(10, ["--epochs", 3]), (2, ["--epochs", 3, "--resume"])])
def test_disk_full_while_saving_keeps_the_run_before(megabytes, args, trained, command, tmp_path):
    """In a new run it is the final checkpoint, of 19 MB, that comes before the earlier best one is moved."""
    shutil.copytree(trained / "out", tmp_path / "out")
    code, _, err = run_process(main, *command, *SMALL, *args, ulimit=f"-f {megabytes * 1000}")
    assert code == 2 and err.startswith("error: can't write") and err.endswith("emotion_model.pth: File too large\n"), (
        err
    )
    assert read_files(tmp_path / "out") == read_files(trained / "out")
