"""The files themselves: who imports whom, sizes, light imports, the README's flags and tables."""

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
SCRIPTS = ["evaluate_emotion", "export_emotion", "predict_emotion", "prepare_data", "train_emotion_cnn"]
MODULES = {  # module: (what it may import at its top, what inside functions as well)
    "audit": ("data decoding models numpy PIL tqdm", "reports"),
    "augment": ("decoding models torch", ""),
    "checkpoints": ("finetuning models torch", ""),
    "console": ("engine models", ""),
    "data": ("decoding models numpy tqdm", ""),
    "decoding": ("models torch numpy PIL", ""),
    "drawing": ("numpy PIL data", ""),
    "distributed": ("models torch", ""),
    "engine": ("distributed models torch tqdm", ""),
    "exporting": ("checkpoints decoding models torch", "onnxruntime safetensors"),
    "faces": ("numpy decoding models", "cv2"),
    "inference": ("checkpoints data decoding engine exporting faces models numpy torch", ""),
    "live": ("decoding faces inference models video numpy torch", ""),
    "models": ("torch", "torchvision safetensors"),
    "overlay": ("checkpoints console decoding faces inference models numpy PIL", ""),
    "reports": ("numpy", "sklearn matplotlib"),
    "splits": ("data distributed models numpy torch", ""),
    "training_run": (
        "augment checkpoints decoding distributed engine finetuning models reports splits numpy torch",
        "",
    ),
    "finetuning": ("models torch", "torchvision"),
    "video": ("checkpoints faces inference models overlay numpy torch tqdm", "reports"),
    "hubconf": ("predict_emotion", ""),
}
FOR_SCRIPTS = {"torch", "numpy", "PIL", "tqdm", "predict_emotion"}
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
FILES = {path.stem: path for path in sorted(REPO.glob("*.py"))}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes):
    """The packages that `nodes` and what is inside them import, without the standard library."""
    names = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                assert part.level == 0, "modules are imported by their names"
                names.add(part.module.partition(".")[0])
    return names - sys.stdlib_module_names


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports_at_top(path):
    tree = parse(path)
    inside = {id(part) for function in functions(tree) for part in ast.walk(function)}
    return imported(
        [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside]
    )


def imports_anywhere(path):
    return imported([parse(path)])


def allowed(name):
    """(at the top, inside functions) of the file `name`.py; None inside: anything but scripts."""
    if name in MODULES:
        top, inside = (set(words.split()) for words in MODULES[name])
        return top, top | inside
    return FOR_SCRIPTS | set(MODULES) - {"hubconf"}, None


def test_every_file_is_in_the_table():
    assert set(FILES) <= set(SCRIPTS) | set(MODULES)
    assert {
        "models",
        "checkpoints",
        "decoding",
        "data",
        "augment",
        "splits",
        "engine",
        "training_run",
        "reports",
        "drawing",
        "evaluate_emotion",
        "predict_emotion",
        "prepare_data",
        "train_emotion_cnn",
        "export_emotion",
        "hubconf",
    } <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_table(name):
    top, inside = allowed(name)
    assert imports_at_top(FILES[name]) <= top
    if inside is None:
        assert not imports_anywhere(FILES[name]) & (set(SCRIPTS) - {"predict_emotion"})
    else:
        assert imports_anywhere(FILES[name]) <= inside


@pytest.mark.parametrize("path", sorted((REPO / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_users_of_the_api(path):
    ours = imports_anywhere(path) & (set(SCRIPTS) | set(MODULES) | {"benchmarks", "tests"})
    assert ours <= {
        "predict_emotion",
        "train_emotion_cnn",
        "checkpoints",
        "console",
        "data",
        "decoding",
        "faces",
        "live",
        "models",
        "overlay",
        "video",
    }


def test_table_test_sees_a_forbidden_import(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("import os\nif True:\n    import cv2\n\ndef f():\n    from torchvision.models import x\n")
    assert imports_at_top(file) == {"cv2"}
    assert imports_anywhere(file) == {"cv2", "torchvision"}


@pytest.mark.parametrize("name", FILES)
def test_sizes(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < 400
    long = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in functions(parse(FILES[name]))
        if node.end_lineno - node.lineno + 1 >= 60
    ]
    assert long == []


def test_importing_the_public_api_is_light(tmp_path):
    code = "import sys, predict_emotion; print([m for m in sys.argv[1:] if m in sys.modules], predict_emotion.__name__)"
    heavy = ["matplotlib", "sklearn", "cv2", "torchvision", "scipy", "pandas", "onnx"]
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
        for script in set(SCRIPTS) & set(FILES):
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
