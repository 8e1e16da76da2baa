"""Prints the path of each text of a .csv file through a checkpoint's taxonomy: ``classify.py CHECKPOINT FILE.csv``.

It loads the checkpoint as any user of transformers would, and knows nothing else of this repository.
"""

import csv
import sys
import textwrap

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

checkpoint, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True)
tree = model.config.tree

with open(file, encoding="utf-8", newline="") as rows:
    texts = [row["text"] for row in csv.DictReader(rows)]
with torch.inference_mode():
    output = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt"))

for text, logits, node_log_probs in zip(texts, output.logits, output.node_log_probs, strict=True):
    path = tree.path(int(logits.argmax()))
    print("\n" + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))
    print("→ " + " → ".join(f"{tree.names[node]} ({node_log_probs[node].exp():.0%})" for node in path))
