"""The library as pip installs it."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import PurePosixPath

from conftest import ROOT, complete

INSTALLED = {"hierarchical_clinicalbert"} | {path.name for path in ROOT.glob("*_hierarchical.py")}
EXTRAS = ("openvino", "ray_job")  # modules that need more than requirements.txt

# imports modules of a folder, where this repository cannot be seen, and prints the files of those that it has loaded
IMPORTS = """
import importlib, json, sys
folder, checkout, *names = sys.argv[1:]
sys.path[:] = [folder, *(path for path in sys.path if path not in ("", checkout))]
for name in names:
    importlib.import_module(name)
print(json.dumps({name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in names}))
"""


def test_pip_installs_the_library_and_the_shipped_files_alone_and_all_can_be_imported(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hierarchical_clinicalbert", source / "hierarchical_clinicalbert")
    for file in (
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")),
    ):
        shutil.copy(file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "installed")
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        required = archive.read(metadata).decode().count("Requires-Dist: ")
    assert {name.split("/")[0] for name in names} == INSTALLED
    assert required == len((ROOT / "requirements.txt").read_text().splitlines())

    modules = [path.with_suffix("").parts for path in map(PurePosixPath, names) if path.suffix == ".py"]
    imported = [".".join(parts).removesuffix(".__init__") for parts in modules if parts[-1] not in EXTRAS]
    assert len(imported) == len(modules) - len(EXTRAS) > 60
    (tmp_path / "imports.py").write_text(IMPORTS)
    done = complete("imports.py", tmp_path / "installed", ROOT, *imported, cwd=tmp_path, modules=None)
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads(done.stdout)
    assert {*imported} <= files.keys()
    assert all(file.startswith(str(tmp_path / "installed")) for file in files.values())
    assert (tmp_path / "installed" / "hierarchical_clinicalbert" / "publishing" / "card.md.jinja").is_file()
