"""Print the predicted path of each text in a CSV file: ``classify.py CHECKPOINT FILE.csv``.

The checkpoint is loaded through transformers alone. Nothing else of this repository is imported,
except a check: transformers would run code of any other repository that the checkpoint names.
"""

import argparse
import csv
import sys
import textwrap
from pathlib import Path

from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("checkpoint", help="a folder, or an id on the Hub")
parser.add_argument("file", help="a CSV file with a column text")
arguments = parser.parse_args()
csv.field_size_limit(2**31 - 1)
try:
    with open(arguments.file, encoding="utf-8-sig", newline="") as rows:
        texts = [row["text"] for row in csv.DictReader(rows)]
except (OSError, UnicodeDecodeError) as error:
    parser.error(f"cannot read {arguments.file}: {error}")
except KeyError:
    parser.error(f"{arguments.file} has no column text")
try:
    refuse_foreign_code(arguments.checkpoint)
    classify = pipeline(
        "hierarchical-text-classification", model=arguments.checkpoint, trust_remote_code=True
    )
except (OSError, KeyError, ValueError) as error:  # KeyError: the model has no such pipeline
    parser.error(f"cannot load the checkpoint {arguments.checkpoint}: {error}")
try:
    results = [*classify(texts)]
except ValueError as error:  # an empty text
    parser.error(f"{arguments.file}: {error}")
sys.stdout.reconfigure(encoding="utf-8")  # in any locale
for text, result in zip(texts, results, strict=True):
    print("\n" + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))
    for one in result["labels"]:  # one, or of a multi-label checkpoint any number
        print("→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in one["path"]))
