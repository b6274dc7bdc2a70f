"""The house: who imports whom, sizes, light imports, and README and docs held to flags, networks, recipes and words."""

import ast
import functools
import importlib
import re
import shlex
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from engine.augment import PRESETS, Strengths, parse_augment
from models import ARCHS, count_parameters, create_model, list_archs

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {"evaluate_emotion", "export_emotion", "predict_emotion", "prepare_data", "train_emotion_cnn"}
FOLDERS = ("engine", "export", "faces", "prepare")
HEAVY = {"cv2", "av", "onnx", "onnxruntime", "matplotlib", "sklearn", "scipy", "pandas", "torchvision", "safetensors"}
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
ROOT = {path.stem: path for path in sorted(REPO.glob("*.py"))}
MODULES = ROOT | {f"{folder}.{path.stem}": path for folder in FOLDERS for path in sorted((REPO / folder).glob("*.py"))}


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, *, at_top=False):
    """The modules that a file imports, such as "torch.nn" or "engine.step"; `at_top`: outside functions only."""
    tree, names = parse(path), set()
    inside = {part for function in functions(tree) for part in ast.walk(function)} if at_top else set()
    for node in set(ast.walk(tree)) - inside:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are imported by their full names"
            in_folder = node.module in FOLDERS
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if in_folder else {node.module}
    return names


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def may_import(name):
    if name in ("errors", "models", "hubconf"):
        return {"errors": set(), "models": {"errors"}, "hubconf": {"inference"}}[name]
    if name in SCRIPTS:
        return set(MODULES) - SCRIPTS - {"hubconf"} | {"predict_emotion"}
    folders = ("faces", "export") if name == "inference" else (name.partition(".")[0],)
    own = {other for other in MODULES if "." in other and other.partition(".")[0] in folders}
    return set(ROOT) - SCRIPTS - {"hubconf", "console"} | own


@pytest.mark.parametrize("name", MODULES)
def test_walls(name):
    ours = {module for module in imported(MODULES[name]) if module.partition(".")[0] in ROOT or module in MODULES}
    assert ours <= may_import(name)
    at_top = {module.partition(".")[0] for module in imported(MODULES[name], at_top=True)}
    anywhere = {module.partition(".")[0] for module in imported(MODULES[name])}
    assert not at_top & HEAVY
    if name.startswith("engine."):
        assert not anywhere & {"PIL", "argparse", "data"}
    if name == "models":
        assert at_top - set(sys.stdlib_module_names) == {"torch", "errors"}
    if name in ("data", "splits"):
        assert not anywhere & {"distributed"}


def test_sizes():
    assert len(ROOT) <= 17
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert max(lines.values()) < 400 and sum(lines.values()) <= 7300
    for name, path in MODULES.items():
        for node in functions(parse(path)):
            most = 60 if (name, node.name) == ("train_emotion_cnn", "main") else 49
            assert node.end_lineno - node.lineno < most, f"{name}.{node.name}"


PAGES = ["README.md", "weights/README.md", *(f"docs/{path.name}" for path in sorted((REPO / "docs").glob("*.md")))]
LAUNCHER_FLAGS = {"--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
# Words that must not come back, as regular expressions; DESIGN.md has what to write instead.
GONE_WORDS = r"""pictures?|colours?|normalis\w+|optimis\w+|licences?|centres?|grey|neighbours?|behaviours?
says|said|eats?|learnt|twins?|beside|so many|whole numbers?|is no number|memory is short|but for|in the place of
where there (?:is|are) (?:none|any)|from nothing|plain (?:loop|way)|of matrix product""".replace("\n", "|")


def read_page(page):
    return (REPO / page).read_text(encoding="utf-8")


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)```", read_page(page), re.DOTALL | re.MULTILINE)


def inline_code(page):
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", without_blocks(read_page(page)))]


def commands(code):
    """(path, words after it) of every script or module of ours that the lines of `code` run."""
    for line in re.split(r"\n|&&", code.replace("\\\n", " ")):
        found = re.search(r"(?:^|\s)(?:(\w+)\.py|-m ((?:benchmarks|examples|tests)\.[\w.]+))(?=\s|$)(.*)", line)
        if found and re.search(r"\b(python|torchrun|modal)\b", line):
            yield REPO / f"{(found[1] or found[2]).replace('.', '/')}.py", shlex.split(found[3], comments=True)


@functools.cache
def flags_of(path):
    added = re.findall(r'\badd(?:_argument)?\(\s*"(--[\w-]+)"([^()]*)', path.read_text(encoding="utf-8"))
    negated = {flag.replace("--", "--no-") for flag, options in added if "BooleanOptionalAction" in options}
    return {"--help", *dict(added), *negated}


@pytest.mark.parametrize("page", PAGES)
def test_commands_flags_and_imports_are_those_of_the_code(page):
    training = flags_of(ROOT["train_emotion_cnn"])
    for code in [*blocks(page, "bash"), *inline_code(page)]:
        for path, words in commands(code):
            own = list(takewhile(lambda word: word != "--", words))
            known = flags_of(path) | (training if path.stem == "train_on_modal" else set())
            assert set(re.findall(FLAG, " ".join(own))) <= known, (path.name, words)
            assert set(re.findall(FLAG, " ".join(words[len(own) :]))) <= training, (path.name, words)
            if code in blocks(page, "bash") and path in ROOT.values() and "--help" not in words:
                importlib.import_module(path.stem).get_args_parser().parse_args(words)  # values and arguments too
    paths = [path for path in REPO.rglob("*.py") if path.parent.name in (REPO.name, "benchmarks", "examples", "soak")]
    named = {code.split()[0] for code in inline_code(page) if code.startswith("--")}
    assert named <= LAUNCHER_FLAGS.union(*map(flags_of, paths))
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_shows_every_flag_with_a_text(script):
    parser = importlib.import_module(script).get_args_parser()
    commands = parser._subparsers._group_actions[0].choices.values() if script == "prepare_data" else [parser]
    for parser in commands:
        assert [action.dest for action in parser._actions if not action.help] == []
        assert all(flag in parser.format_help() for flag in parser._option_string_actions)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_linked_and_links_lead_to_files_and_headings(page):
    assert len(read_page(page).encode()) <= (10_000 if page == "README.md" else 12_000)
    assert page == "README.md" or f"({page}" in read_page("README.md")
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(read_page(page))):
        name, _, anchor = link.partition("#")
        if not name.startswith("http"):
            target = (REPO / page).parent / name if name else REPO / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def table(page, head):
    """{first cell: the others} of the page's table whose head begins with `head`."""
    lines = read_page(page).partition(f"\n| {head} |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in takewhile(bool, lines)]
    return {first.strip("`"): others for first, *others in rows}


def test_the_readme_names_modules_folders_and_models_as_they_are():
    names = [f"{name}.py" for name in ROOT] + [f"{name}/" for name in (*FOLDERS, "examples", "benchmarks", "weights")]
    assert [name for name in names if name not in read_page("README.md")] == []
    rows = table("README.md", "arch | what it is")
    assert set(rows) == set(list_archs())
    for arch, (text, size, parameters) in rows.items():
        with torch.device("meta"):
            model, spec = create_model(arch, 7), ARCHS[arch].input_spec
        dropouts = [f"dropout {p}" for p in dict.fromkeys(m.p for m in model.modules() if hasattr(m, "p"))]
        assert size == f"{spec.channels}x{spec.image_size}x{spec.image_size}"
        assert parameters == f"{count_parameters(model):,}"
        assert set(re.findall(r"dropout [\d.]+\d", text)) <= set(dropouts)


def test_the_tables_of_recipes_and_presets_are_as_the_code():
    rows = table("docs/training.md", "arch | optimizer, learning rate")
    assert set(rows) == set(list_archs())
    for arch, row in rows.items():
        recipe = ARCHS[arch].recipe
        optimizer = {"adam": "Adam", "muon": "Muon"}[recipe.optimizer]
        decay = f", weight decay {recipe.weight_decay}" if recipe.weight_decay else ""
        ema = f"; EMA {recipe.ema}" if recipe.ema else ""
        loss = {"none": "cross-entropy", "balanced": "weighted by n / (classes * n_class)"}[recipe.class_weights]
        loss += f", logit adjustment {recipe.logit_adjustment}" if recipe.logit_adjustment else ""
        loss += f", label smoothing {recipe.label_smoothing}" if recipe.label_smoothing else ""
        schedule, batch, epochs = recipe.schedule, str(recipe.batch_size), str(recipe.epochs)
        lr = f"{recipe.lr}, {recipe.backbone_lr} times below the head" if recipe.backbone_lr != 1 else f"{recipe.lr}"
        assert row == [f"{optimizer}{decay}, {lr}{ema}", schedule, batch, epochs, recipe.augment, loss]
    presets = table("docs/training.md", "preset of `--augment` | strengths")
    assert {name: parse_augment(text) for name, (text,) in presets.items()} | {"none": Strengths()} == PRESETS


def test_words_that_must_not_come_back():
    pages = [REPO / page for page in PAGES if page != "docs/changes.md"]  # which lists old names
    folders = [REPO, *(REPO / name for name in (*FOLDERS, "benchmarks", "examples", "tests", "tests/soak"))]
    modules = [path for folder in folders for path in folder.glob("*.py") if path != Path(__file__).resolve()]
    found = []
    for path in [*pages, *modules]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = re.finditer(rf"\b(?:{GONE_WORDS})\b", line, re.IGNORECASE)
            found += [f"{path.relative_to(REPO)}, line {number}: {match[0]}" for match in words]
    assert found == []


def test_requirements_are_the_seven_core_packages():
    names = re.findall(r"^[\w-]+", read_page("requirements.txt").lower(), re.MULTILINE)
    assert sorted(names) == ["matplotlib", "numpy", "pillow", "scikit-learn", "torch", "torchvision", "tqdm"]
    assert "torch>=2.10\n" in read_page("requirements.txt")
    assert "-r requirements.txt" in read_page("requirements-dev.txt")
