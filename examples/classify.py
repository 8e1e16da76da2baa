"""Print the predicted path of each text in a CSV file: ``classify.py CHECKPOINT FILE.csv``.

The checkpoint is loaded through transformers alone. Nothing else of this repository is imported.
"""

import csv
import sys
import textwrap

from transformers import pipeline

checkpoint, file = sys.argv[1:]
classify = pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True)
with open(file, encoding="utf-8-sig", newline="") as rows:
    texts = [row["text"] for row in csv.DictReader(rows)]
for text, result in zip(texts, classify(texts), strict=True):
    print("\n" + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))
    for one in result.get("labels", [result]):  # of a multi-label checkpoint
        print("→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in one["path"]))
