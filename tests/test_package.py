"""The library as pip installs it, and the files of the container."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT, clear_rows, complete, copy_checkpoint, write_csv, xlsx
from forked import LIBRARIES

INSTALLED = {"hierarchical_clinicalbert"} | {path.name for path in ROOT.glob("*_hierarchical.py")}
EXTRAS = ("openvino", "ray_job")  # modules that need more than requirements.txt

# imports modules of a folder, where this repository cannot be seen, and prints the files of those
# that it has loaded
IMPORTS = """
import importlib, json, sys
folder, checkout, *names = sys.argv[1:]
sys.path[:] = [folder, *(path for path in sys.path if path not in ("", checkout))]
for name in names:
    importlib.import_module(name)
modules = sys.modules.items()
print(json.dumps({name: m.__file__ for name, m in modules if name.split(".")[0] in names}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the folder into which pip installed the library."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "hierarchical_clinicalbert", source / "hierarchical_clinicalbert")
    for pattern in ("*.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "installed", source], check=True)
    return folder / "installed"


def test_pip_installs_the_library_and_the_shipped_files_alone_and_all_can_be_imported(
    installed, tmp_path
):
    names = [path.relative_to(installed) for path in installed.rglob("*") if path.is_file()]
    names = [name for name in names if "__pycache__" not in name.parts]
    (metadata,) = installed.glob("*.dist-info/METADATA")
    required = metadata.read_text().count("Requires-Dist: ")
    assert {name.parts[0] for name in names} - {metadata.parent.name} == INSTALLED
    assert required == len((ROOT / "requirements.txt").read_text().splitlines())

    modules = [name.with_suffix("").parts for name in names if name.suffix == ".py"]
    imported = [
        ".".join(parts).removesuffix(".__init__") for parts in modules if parts[-1] not in EXTRAS
    ]
    assert len(imported) == len(modules) - len(EXTRAS) > 60
    (tmp_path / "imports.py").write_text(IMPORTS)
    done = complete("imports.py", installed, ROOT, *imported, cwd=tmp_path, modules=LIBRARIES)
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads(done.stdout)
    assert {*imported} <= files.keys()
    assert all(file.startswith(str(installed)) for file in files.values())
    assert (installed / "hierarchical_clinicalbert" / "publishing" / "card.md.jinja").is_file()


def test_the_manuals_lines_train_and_publish_a_model_in_an_empty_folder(
    installed, hub, tiny_encoder, tmp_path
):
    """Run docs/python.md, over an encoder that trains in a second."""
    hub.add_repo("base/tiny", Path(tiny_encoder))
    for split, offset in (("train", 1), ("validation", 2), ("test", 3)):
        write_csv(tmp_path / f"{split}.csv", clear_rows(offset, wrong=False))
    shutil.copy(ROOT / "examples" / "taxonomy.yaml", tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert {*re.findall(r"from (\w+) import", code)} == {
        *("datasets", "hierarchical_clinicalbert", "transformers")
    }
    code = code.replace("emilyalsentzer/Bio_ClinicalBERT", "base/tiny")
    code = code.replace("user/name", "alice/ten").replace('"4bit"', '"none"')
    settings = dict(os.environ) | hub.environment(token="hf_alice") | {"PYTHONPATH": str(installed)}
    done = complete("-c", code, cwd=tmp_path, environment=settings, modules=None)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "'test_accuracy': 0.9" in done.stdout or "'test_accuracy': 1.0" in done.stdout

    commit = hub.commits("alice/ten")[-1]
    assert {"README.md", "metrics.json", "heads.safetensors"} <= commit.files.keys()
    assert b"test accuracy" in commit.files["README.md"].lower()
    assert re.findall(rb"(?m)^\w+", commit.files["requirements.txt"]) == [b"torch", b"transformers"]
    again = (tmp_path / "results" / "here" / "config.json").read_text()
    assert json.loads(again)["calibration"]["num_texts"] == 1


def test_the_container_has_the_files_that_its_commands_need(tmp_path):
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for sources, target in re.findall(r"(?m)^COPY (.+) (\S+)$", (ROOT / "Dockerfile").read_text()):
        folder = tmp_path / "app" / target
        for file in (file for source in sources.split() for file in ROOT.glob(source)):
            assert any(fnmatch(file.relative_to(ROOT).parts[0], pattern) for pattern in kept), file
            if file.is_dir():
                shutil.copytree(file, folder, dirs_exist_ok=True)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
    (tmp_path / "texts.xlsx").write_bytes(xlsx([["text"], ["a study of ulcers"]]))
    copy_checkpoint("self_contained", tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "huggingface")}
    words = (
        "--model",
        tmp_path / "model",
        "--input",
        tmp_path / "texts.xlsx",
        "--output",
        tmp_path / "out.jsonl",
    )
    for command in (("predict.py", *words), ("space/app.py", "--help")):
        done = complete(*command, cwd=tmp_path / "app", environment=environment, modules=LIBRARIES)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
