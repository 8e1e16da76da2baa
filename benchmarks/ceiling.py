"""Bound the accuracy if texts occur under several labels: ``python benchmarks/ceiling.py --file test.csv``.

The file has the columns ``text`` (or ``medical_abstract``) and ``label`` (or ``condition_label``).

- Seen: the highest accuracy with one prediction per text, from the texts that occur in the file under several labels.
- Estimated: assume that the Medical Abstracts corpus lists a document once under each of its classes. Assume that its test split
  is a share p = 0.2 of these rows, drawn at random. Of a document's two rows, both are in the split with probability
  p², and at least one with 1 - (1 - p)². So if a share s of the texts in the split has two labels there, s · (2 - p) / p of its
  texts have a second label somewhere. For those, one prediction is counted as correct at most half of the time.
- Where: the share of the texts seen under several labels that have each class among them; and, with ``--predictions``
  (``test_predictions.csv`` of one or several runs), the share of errors with the class as label or prediction.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hierarchical_clinicalbert.data.trained_texts import normalise_text


def shares(sets: pd.Series) -> dict[str, float]:
    """Return the share of the sets that contain each class, the most frequent first."""
    return {str(name): float(count / len(sets)) for name, count in sets.explode().value_counts().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, nargs="+", required=True, help="one split, in one or several files")
    parser.add_argument(
        "--share", type=float, default=0.2, help="p, the rows of the corpus that the split was drawn as"
    )
    parser.add_argument("--predictions", type=Path, nargs="+", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ceiling.json")
    arguments = parser.parse_args()
    rows = pd.concat([pd.read_csv(file, dtype=str) for file in arguments.file])
    text = "text" if "text" in rows else "medical_abstract"
    label = "label" if "label" in rows else "condition_label"
    texts = rows[text].map(normalise_text)
    seen = rows.groupby([texts, label]).size().groupby(level=0).max().sum() / len(rows)
    labels_of = rows.groupby(texts)[label].agg(set)
    several = float((labels_of.map(len) > 1).mean())
    second = min(1.0, several * (2 - arguments.share) / arguments.share)
    result = {
        "rows": len(rows),
        "texts": int(texts.nunique()),
        "texts_under_several_labels": several,
        "ceiling_seen": float(seen),
        "estimated_texts_with_a_second_label": second,
        "ceiling_estimated": 1 - second / 2,
        "of_the_texts_under_several_labels": shares(labels_of[labels_of.map(len) > 1]),
    }
    if arguments.predictions:
        predictions = pd.concat([pd.read_csv(file) for file in arguments.predictions])
        errors = predictions[predictions["label"] != predictions["prediction"]]
        pairs = pd.Series([{*pair} for pair in zip(errors["label"], errors["prediction"], strict=True)])
        result["of_the_errors"] = shares(pairs)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, value in result.items():
        classes = value.items() if isinstance(value, dict) else [("", value)]
        for label, number in classes:
            shown = f"{number:,}" if isinstance(number, int) else f"{number:.1%}"
            print(f"{name.replace('_', ' ')}{f', with {label}' if label else ''}: {shown}")


if __name__ == "__main__":
    main()
