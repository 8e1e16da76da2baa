"""Run the code of inference.ipynb from top to bottom on a test checkpoint."""

import json
import os

from conftest import ROOT, complete

# the notebook starts predict.py and the Space: in forks, which have imported the libraries
FORKS = """
import os, runpy, subprocess, sys, torch
torch.set_num_threads(1)  # threads of OpenMP do not survive a fork

class Forked:
    def __init__(self, line, env=os.environ, **options):
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env)
            sys.argv = [str(word) for word in line[1:]]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                os._exit(end.code or 0)
            os._exit(1)
        self.poll, self.terminate = lambda: None, lambda: os.kill(self.pid, 15)

    def wait(self):
        return os.waitpid(self.pid, 0)[1]

def run(line, **options):
    assert Forked(line).wait() == 0

subprocess.Popen, subprocess.run = Forked, run
"""


def test_the_notebook_runs_from_top_to_bottom(clear_checkpoint, labels_checkpoint):
    cells = json.loads((ROOT / "inference.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells), (
        "a cell of the notebook as it is committed has no output"
    )
    code = "\n".join([FORKS, *("".join(cell["source"]) for cell in cells)])
    settings = {
        "CHECKPOINT": clear_checkpoint,
        "LABELS_CHECKPOINT": labels_checkpoint,
        "MPLBACKEND": "agg",
    }
    done = complete("-c", code, environment=os.environ | settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the heaviest word: " in done.stdout.splitlines()[-1]
