"""The house: who imports whom, sizes, light imports, and the README held to the flags, networks and recipes."""

import ast
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import evaluate_emotion
import export_emotion
import predict_emotion
import prepare_data
import train_emotion_cnn
from models import ARCHS, count_parameters, create_model, list_archs

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {"evaluate_emotion", "export_emotion", "predict_emotion", "prepare_data", "train_emotion_cnn"}
FOLDERS = {"engine", "faces", "prepare", "export"}
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
ROOT = {path.stem: path for path in sorted(REPO.glob("*.py"))}
MODULES = ROOT | {
    f"{folder}.{path.stem}": path for folder in sorted(FOLDERS) for path in sorted((REPO / folder).glob("*.py"))
}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, *, at_top=False):
    """The modules that a file imports, such as "torch.nn" or "engine.loop"; `at_top`: outside functions only."""
    tree, names = parse(path), set()
    inside = {id(part) for function in functions(tree) for part in ast.walk(function)} if at_top else ()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are imported by their full names"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module in FOLDERS else {node.module}
            )
    return names


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def may_import(name):
    """The modules of the project that module `name` may import."""
    folder = name.partition(".")[0]
    modules = set(ROOT) - SCRIPTS - {"hubconf", "console"}
    if name == "errors":
        return set()
    if name == "models":
        return {"errors"}
    if name == "hubconf":
        return {"inference"}
    if name in SCRIPTS:
        return set(MODULES) - SCRIPTS - {"hubconf"} | {"predict_emotion"}
    if name == "inference":
        return modules | {other for other in MODULES if other.startswith(("faces.", "export."))}
    if folder in FOLDERS:
        return modules | {other for other in MODULES if other.startswith(f"{folder}.")}
    return modules


@pytest.mark.parametrize("name", MODULES)
def test_walls(name):
    ours = {module for module in imported(MODULES[name]) if module.partition(".")[0] in ROOT or module in MODULES}
    assert ours <= may_import(name)


def test_the_walls_are_seen(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import os\nif True:\n    import cv2\n\ndef f():\n    from engine import loop\n    import console\n"
    )
    assert imported(file, at_top=True) == {"os", "cv2"}
    assert imported(file) == {"os", "cv2", "engine.loop", "console"}
    assert not {"engine.loop", "console"} & may_import("faces.video")


@pytest.mark.parametrize("name", MODULES)
def test_packages_stay_where_they_belong(name):
    at_top = {module.partition(".")[0] for module in imported(MODULES[name], at_top=True)}
    assert not at_top & {"cv2", "av", "onnx", "onnxruntime", "matplotlib", "sklearn", "torchvision", "safetensors"}
    anywhere = {module.partition(".")[0] for module in imported(MODULES[name])}
    if name.startswith("engine."):
        assert not anywhere & {"PIL", "argparse", "data"}
    if name == "models":
        assert at_top - set(sys.stdlib_module_names) == {"torch", "errors"}
    if name in ("data", "splits"):
        assert not anywhere & {"distributed"}


def test_sizes():
    assert len(ROOT) <= 17
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert [name for name, count in lines.items() if count >= 400] == []
    assert sum(lines.values()) <= 6500
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, path in MODULES.items()
        for node in functions(parse(path))
        if node.end_lineno - node.lineno + 1 > (60 if (name, node.name) == ("train_emotion_cnn", "main") else 49)
    ]
    assert long == []


def test_importing_the_public_api_is_light():
    code = "import sys, predict_emotion; print([m for m in sys.argv[1:] if m in sys.modules], predict_emotion.__name__)"
    heavy = ["matplotlib", "sklearn", "cv2", "torchvision", "scipy", "pandas", "onnx", "onnxruntime", "av"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[] predict_emotion", 0), done.stderr


# The command lines and the README


def help_texts(capsys):
    """{command line: what its --help prints} of every script that is there."""
    scripts = (train_emotion_cnn, evaluate_emotion, export_emotion, predict_emotion, prepare_data)
    mains = {script.__name__: script.main for script in scripts}
    lines = [(name, []) for name in mains] + [
        ("prepare_data", ["sample"]),
        ("prepare_data", ["fer2013"]),
        ("prepare_data", ["crop"]),
        ("prepare_data", ["audit"]),
    ]
    texts = {}
    for name, words in lines:
        with pytest.raises(SystemExit) as stop:
            mains[name]([*words, "--help"])
        assert stop.value.code == 0
        texts[" ".join([name, *words])] = capsys.readouterr().out
    return texts


def test_every_flag_is_in_the_readme(capsys):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    missing = []
    for command, text in help_texts(capsys).items():
        flags = set(re.findall(FLAG, text)) - {"--help"}
        assert flags or command == "prepare_data"
        missing += [f"{command}: {flag}" for flag in sorted(flags - set(re.findall(FLAG, readme)))]
    assert missing == []


def test_readme_names_no_flag_that_is_not_there(capsys):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    known = set(re.findall(FLAG, " ".join(help_texts(capsys).values())))
    wrong = set()
    for line in readme.splitlines():
        for script in SCRIPTS:
            if f"python {script}.py" in line or f" {script}.py --" in line:
                command = line.partition(f"{script}.py")[2].partition("#")[0]
                wrong |= set(re.findall(FLAG, command)) - known
    assert wrong == set()


@pytest.mark.parametrize("script", ["evaluate_emotion", "predict_emotion", "export_emotion", "prepare_data"])
def test_readme_lists_the_flags_of_each_script(capsys, script):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^`{script}\.py`: (.*?)\n\n", readme, re.MULTILINE | re.DOTALL)
    texts = [text for command, text in help_texts(capsys).items() if command.split()[0] == script]
    assert set(re.findall(FLAG, listed)) == set(re.findall(FLAG, " ".join(texts))) - {"--help"}


def readme_table(second_cell):
    """{first cell: the others} of the README's table that begins with `arch` and this cell."""
    lines = (REPO / "README.md").read_text(encoding="utf-8").partition(f"| arch | {second_cell} |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in takewhile(bool, lines)]
    return {first.strip("`"): others for first, *others in rows}


def test_networks_are_as_the_readme_says():
    table = readme_table("what it is")
    assert set(table) == set(list_archs())
    for arch, (text, size, parameters) in table.items():
        model, spec = create_model(arch, 7), ARCHS[arch].input_spec
        dropouts = [f"dropout {p}" for p in dict.fromkeys(m.p for m in model.modules() if hasattr(m, "p"))]
        assert (size, parameters) == (
            f"{spec.channels}x{spec.image_size}x{spec.image_size}",
            f"{count_parameters(model):,}",
        )
        assert [words for words in re.findall(r"dropout [\d.]+\d", text) if words not in dropouts] == [], dropouts


def test_recipes_are_as_the_readme_says():
    table = readme_table("optimiser, learning rate")
    assert set(table) == set(list_archs())
    for arch, row in table.items():
        recipe = ARCHS[arch].recipe
        decay, ema = recipe.weight_decay, recipe.ema
        optimiser = ", ".join(
            [
                {"adam": "Adam", "adamw": "AdamW"}[recipe.optimizer],
                *([f"weight decay {decay}"] if decay else []),
                str(recipe.lr),
            ]
        )
        loss = {"none": "cross-entropy", "balanced": "weighted by n / (classes * n_class)"}[recipe.class_weights]
        if recipe.label_smoothing:
            loss += f", label smoothing {recipe.label_smoothing}"
        assert row == [
            optimiser + (f"; EMA {ema}" if ema else ""),
            recipe.schedule,
            str(recipe.batch_size),
            str(recipe.epochs),
            recipe.augment,
            loss,
        ]


@pytest.mark.parametrize("page", ["README.md", "weights/README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", (REPO / page).read_text(encoding="utf-8"))
    here = [link for link in links if not link.startswith("http")]
    assert here and [link for link in here if not (REPO / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("command", ["train_emotion_cnn", "evaluate_emotion", "export_emotion", "predict_emotion"])
def test_help_shows_every_flag_with_a_text(capsys, command):
    text = help_texts(capsys)[command]
    assert "default" in text
    parser = sys.modules[command].get_args_parser()
    assert [action.dest for action in parser._actions if not action.help] == []


# The requirements


def requirement_lines(name):
    lines = [line.partition("#")[0].strip() for line in (REPO / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def test_requirements_are_the_seven_core_packages():
    lines = requirement_lines("requirements.txt")
    found = dict(re.fullmatch(r"([A-Za-z-]+)>=([0-9.]+)", line).groups() for line in lines)
    assert {name.lower() for name in found} == {
        "torch",
        "torchvision",
        "numpy",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "tqdm",
    }
    assert tuple(map(int, found["torch"].split("."))) >= (2, 10)


def test_requirements_for_development_add_to_them():
    lines = requirement_lines("requirements-dev.txt")
    assert lines[0] == "-r requirements.txt"
    assert any(line.lower().startswith("pytest") for line in lines)
