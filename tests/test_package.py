"""The library as pip installs it."""

import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT, complete

INSTALLED = {"hierarchical_clinicalbert"} | {path.name for path in ROOT.glob("*_hierarchical.py")}


def test_pip_installs_the_library_and_the_shipped_files_alone(tmp_path):
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

    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
    code += "from hierarchical_clinicalbert.publishing import card\n"
    code += "from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer\n"
    code += "from pipeline_hierarchical import HierarchicalTextClassificationPipeline\n"
    code += "print(card.TEMPLATE, card.TEMPLATE.is_file())"
    done = complete("-c", code, cwd=tmp_path, modules=None)
    assert done.stdout.split() == [
        str(tmp_path / "installed/hierarchical_clinicalbert/publishing/card.md.jinja"),
        "True",
    ]
