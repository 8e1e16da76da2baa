"""Measure whether reading a text in windows loses anything:

    python benchmarks/windows.py --data FOLDER --encoder ENCODER

- windows: OHSUMED by its recipe, with two epochs of whole texts and without contrastive steps.
  Texts of up to 512 tokens are read in one window, in windows of 128 tokens, or are truncated at
  128.
- positions: an OHSUMED abstract of one of four classes is hidden among abstracts of other classes.
  Training texts have up to 4,096 tokens, mostly fewer, and test texts about 4,000, with the
  abstract at each of eight positions. One model reads all tokens, one the first
  512. A third way takes the second model, classifies each 512 tokens of a text alone, and averages
       the probabilities.

FOLDER holds ``ohsumed/{train,test,labels}.csv``. Finished runs stay in the output file.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import train
from modeling_hierarchical import HierarchicalForSequenceClassification

PARTS = ("windows", "positions")
WINDOWS = {  # the window and the maximum length of a text, in tokens
    "one window of 512": (512, 512),
    "windows of 128": (128, 512),
    "truncated at 128": (512, 128),
}
HIDDEN = ("C04", "C06", "C10", "C14")  # classes of the abstract that decides
LEFT_OUT = "C23"  # pathological conditions: its abstracts concern any of these classes
POSITIONS = 8
TOKENS = 4096
READ = {"all tokens": TOKENS, "first 512 tokens": 512}
ROWS = {"train": 1200, "validation": 120, "test": 400}
FLAGS = (
    "--contrastive_steps 0 --num_train_epochs 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 4"
    " --pooling label_attention --learning_rate 1e-3 --heads_learning_rate 3e-2 --lora_r 16 "
    "--lora_alpha 32"
    " --text_column text --label_column label --seed 1"
)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:  # in a process of its own
        return train_with_window(int(sys.argv[2]), sys.argv[3:])
    parser = harness.flag_parser(__doc__, "windows.json", "data", "encoder", "runs")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results = harness.read_results(
        arguments.output, {"processor": harness.processor(), "windows": [], "positions": []}
    )
    data = arguments.data / "ohsumed"
    for seed in arguments.seed if "windows" in arguments.part else ():
        for name in WINDOWS:
            if not any((run["model"], run["seed"]) == (name, seed) for run in results["windows"]):
                results["windows"].append(
                    score_windows(name, seed, data, arguments.encoder, arguments.runs)
                )
                harness.write_results(arguments.output, results)
    if "positions" in arguments.part and not results["positions"]:
        results["positions"] = score_positions(data, arguments.encoder, arguments.runs)
        harness.write_results(arguments.output, results)
    print_tables(results)


def train_with_window(window: int, words: list[str]) -> None:
    """Run train.py on the command line ``words``, with a model that reads windows of this
    length.
    """
    build = train.build_model

    def build_with_window(*arguments: Any) -> HierarchicalForSequenceClassification:
        model = build(*arguments)
        model.window = model.config.window = window
        return model

    train.build_model = build_with_window
    train.main(words)


def run_training(
    folder: Path, encoder: str, window: int, *words: str, **flags: Any
) -> dict[str, Any]:
    """Train in a process of its own, and return the metrics."""
    script = (__file__, "--train", window)
    return harness.train(folder, *words, script=script, model_name_or_path=encoder, **flags)


def score_windows(name: str, seed: int, data: Path, encoder: str, runs: Path) -> dict[str, Any]:
    """Train on OHSUMED with one of `WINDOWS`, and return the scores of the test file."""
    window, length = WINDOWS[name]
    flags = {
        "train_file": data / "train.csv",
        "test_file": data / "test.csv",
        "max_length": length,
        "seed": seed,
    }
    flags |= {"taxonomy": data / "labels.csv", "class_names": data / "labels.csv"}
    flags |= {"num_train_epochs": 2, "consistency": 0, "contrastive_steps": 0}
    folder = runs / f"windows-{window}-{length}-{seed}"
    recipe = str(harness.ROOT / "recipes" / "ohsumed.yaml")
    metrics = run_training(folder, encoder, window, recipe, **flags)
    scores = {score: metrics[f"test_{score}"] for score in ("accuracy", "macro_f1", "log_loss")}
    return {"model": name, "seed": seed, **scores}


# ── Positions ─────────────────────────────────────────────────────────────────────────────────────


def hide_abstracts(
    rows: pd.DataFrame, count: int, lengths: pd.Series, seed: int, scored: bool
) -> pd.DataFrame:
    """Hide abstracts of `HIDDEN` among others.

    The ``scored`` texts are long, with equally many at each position; of others the position and
    the logarithm of the length are uniform.

    Args:
        rows: ``text`` and ``label`` of abstracts.
        count: the number of texts.
        lengths: the tokens of each abstract.

    Returns:
        Columns ``text``, ``label`` and ``position``, from 0 to `POSITIONS` - 1 in texts that have
        so many abstracts before it.
    """
    generator = np.random.default_rng(seed)
    made = []
    hidden = generator.permutation(rows.index[rows["label"].isin(HIDDEN)])
    others = rows.index[~rows["label"].isin([*HIDDEN, LEFT_OUT])]
    for number in range(count):
        deciding = hidden[number % len(hidden)]
        least = lengths[deciding] + 2
        room = (TOKENS if scored else least * (TOKENS / least) ** generator.random()) - least
        order = generator.permutation(others)
        order = order[lengths[order].cumsum() <= room]
        place = number % POSITIONS if scored else generator.integers(POSITIONS)
        before = round(place * len(order) / (POSITIONS - 1))
        parts = [*order[:before], deciding, *order[before:]]
        text = " ".join(rows["text"][parts])
        made.append({"text": text, "label": rows["label"][deciding], "position": place})
    return pd.DataFrame(made)


def score_positions(data: Path, encoder: str, runs: Path) -> list[dict[str, Any]]:
    """Train on long texts, and return the accuracy by the position of the abstract that decides."""
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=10**6)
    splits = {}
    files = {}
    train_rows = pd.read_csv(data / "train.csv", dtype=str).sample(frac=1, random_state=0)
    test_rows = pd.read_csv(data / "test.csv", dtype=str)
    sources = {"validation": train_rows[:600], "train": train_rows[600:], "test": test_rows}
    for seed, (split, rows) in enumerate(sources.items()):
        rows = rows.reset_index(drop=True)
        lengths = pd.Series([len(ids) - 2 for ids in tokenizer([*rows["text"]])["input_ids"]])
        splits[split] = hide_abstracts(rows, ROWS[split], lengths, seed, scored=split == "test")
        files[f"{split}_file"] = runs / f"positions-{split}.csv"
        splits[split].to_csv(files[f"{split}_file"], index=False)

    # ── Two models, and the average of the second one ─────────────────────────────────────────────
    test = splits["test"]
    predictions = {}
    for name, length in READ.items():
        folder = runs / f"positions-{length}"
        run_training(folder, encoder, 512, *FLAGS.split(), max_length=length, **files)
        predictions[name] = harness.read_predictions(folder)["prediction"]
    predictions["mean of windows"] = classify_windows(folder, tokenizer, test["text"])
    correct = pd.DataFrame({name: test["label"] == labels for name, labels in predictions.items()})
    by_position = correct.groupby(test["position"]).mean()
    return [
        {"model": name, "accuracy": correct[name].mean(), "by_position": [*by_position[name]]}
        for name in predictions
    ]


def classify_windows(
    folder: Path, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> list[str]:
    """Classify each 512 tokens of texts alone, special tokens included, and return the label of
    greatest mean probability.
    """
    windows = []
    of_text = []
    room = 510
    for number, text in enumerate(texts):
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        for start in range(0, len(spans), room):
            windows.append(text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]])
            of_text.append(number)
    results = harness.load_classifier(folder)(windows, top_k=len(HIDDEN))
    scores = pd.DataFrame(
        [{one["label"]: one["score"] for one in result["labels"]} for result in results]
    )
    return [*scores.groupby(np.array(of_text)).mean().idxmax(axis=1)]


def print_tables(results: dict[str, Any]) -> None:
    runs = pd.DataFrame(results["windows"])
    metrics = ("accuracy", "macro_f1", "log_loss")
    rows = [
        [name, len(scores), *(harness.spread(scores[metric], metric) for metric in metrics)]
        for name, scores in (runs.groupby("model", sort=False) if len(runs) else ())
    ]
    harness.print_table(["OHSUMED", "seeds", "accuracy", "macro-F1", "log loss"], rows)
    rows = [
        [
            run["model"],
            f"{100 * run['accuracy']:.1f}",
            *(f"{100 * share:.0f}" for share in run["by_position"]),
        ]
        for run in results["positions"]
    ]
    harness.print_table(["hidden abstract", "accuracy", *map(str, range(1, POSITIONS + 1))], rows)


if __name__ == "__main__":
    main()
