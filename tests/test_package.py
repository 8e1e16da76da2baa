"""The library as pip installs it, and the files of the container."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import PurePosixPath

from conftest import ROOT, complete, copy_checkpoint, xlsx
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


def test_pip_installs_the_library_and_the_shipped_files_alone_and_all_can_be_imported(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hierarchical_clinicalbert", source / "hierarchical_clinicalbert")
    for pattern in ("*.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "installed")
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        required = archive.read(metadata).decode().count("Requires-Dist: ")
    assert {name.split("/")[0] for name in names} == INSTALLED
    assert required == len((ROOT / "requirements.txt").read_text().splitlines())

    modules = [
        path.with_suffix("").parts for path in map(PurePosixPath, names) if path.suffix == ".py"
    ]
    imported = [
        ".".join(parts).removesuffix(".__init__") for parts in modules if parts[-1] not in EXTRAS
    ]
    assert len(imported) == len(modules) - len(EXTRAS) > 60
    (tmp_path / "imports.py").write_text(IMPORTS)
    done = complete(
        "imports.py", tmp_path / "installed", ROOT, *imported, cwd=tmp_path, modules=LIBRARIES
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads(done.stdout)
    assert {*imported} <= files.keys()
    assert all(file.startswith(str(tmp_path / "installed")) for file in files.values())
    assert (
        tmp_path / "installed" / "hierarchical_clinicalbert" / "publishing" / "card.md.jinja"
    ).is_file()


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
