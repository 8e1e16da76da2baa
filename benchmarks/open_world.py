"""Measure how well texts that belong to no class are told from others:

    python benchmarks/open_world.py --data FOLDER --encoder ENCODER [--part clinc150 ohsumed texts]

FOLDER holds ``clinc150/{train,validation,test,out_of_scope_validation,out_of_scope_test}.csv`` and
``ohsumed/{train,test,labels}.csv``. Models are trained by ``train.py``, with the flags in `FLAGS`
after those of a recipe. Finished runs stay in ``--runs``, so an interrupted benchmark continues.
Parts:

- clinc150: 150 intents in 10 domains, and queries of no intent (Larson et al., 2019, "An evaluation
  dataset for intent classification and out-of-scope prediction"). The validation queries of no
  intent choose among the candidates;
- ohsumed: leaves and one branch are left out of training (`LEFT_OUT`), and their test texts are the
  unknown ones;
- texts: the made-up texts of ``strange_texts.txt``, which are older than any method here, by the
  models of ``--part ohsumed``.

Scores of a text, all higher if it is stranger:

- largest probability, entropy: of the leaves, calibrated. The former is negative;
- energy: minus the logsumexp of the roots' inclusive values (Liu et al., 2020, "Energy-based
  out-of-distribution detection");
- nearest texts: cosine distance from the tenth nearest training text (Sun et al., 2022). A baseline
  only: it stores training texts;
- Mahalanobis: the distance from the nearest class;
- relative Mahalanobis: minus the distance under one normal distribution of all texts (Ren et al.,
  2021, "A simple fix to Mahalanobis distance for improving near-OOD detection");
- Mahalanobis and energy: the strangeness of `OpenWorld`.

"Found" is the share of unknown texts whose score exceeds that of 95 % of the known test texts. "At
p ≤ 0.05" is what a user gets: the shares of unknown and of known test texts whose ``p_value`` is at
most 0.05.
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
import torch
from quality import PLAIN
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from open_world_hierarchical import STRANGE

NEAREST = 10
BATCH = 64
SCORES = ("largest probability", "entropy", "energy", "nearest texts")
SCORES += ("relative Mahalanobis", "Mahalanobis", "Mahalanobis and energy")
PARTS = ("clinc150", "ohsumed", "texts")
FLAGS: dict[str, dict[str, Any]] = {
    "clinc150": {
        **{
            "max_length": 64,
            "per_device_train_batch_size": 32,
            "label_smoothing_factor": 0.05,
            "num_train_epochs": 5,
        },
        **{"lora_r": 64, "lora_alpha": 128, "heads_init": "prototypes"},
    },
    "ohsumed": {**PLAIN, "max_length": 128, "num_train_epochs": 2},
}
LEFT_OUT = {
    "a": (("C06", "C20"), ("C04",)),
    "b": (("C10", "C18"), ("C01", "C02", "C03")),
}  # leaves, and all leaves of a branch


def main() -> None:
    parser = harness.flag_parser(__doc__, "open_world.json", "data", "encoder", "runs")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3], help="of CLINC150's runs")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results = harness.read_results(arguments.output, {})
    for part in arguments.part:
        results |= {"clinc150": clinc150, "ohsumed": ohsumed, "texts": made_up_texts}[part](
            arguments
        )
        harness.write_results(arguments.output, results)
    print_results(results)


# ── Models and their outputs ──────────────────────────────────────────────────────────────────────


def run_model(classify: Any, texts: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return vectors (num_texts, H), and the scores that need no training text."""
    model = classify.model
    leaves = classify.tree.num_leaves

    def outputs(_: list[int], batch: Any) -> tuple[torch.Tensor, ...]:
        output = model(**batch, output_vectors=True)
        open_world = model.heads.open_world
        distances = open_world.distances(output.vectors[:, :-1]).amin(1)
        return (
            output.vectors,
            output.node_log_probs[:, :leaves],
            distances,
            open_world(output.vectors),
        )

    arrays = harness.run_batches(classify.tokenizer, texts, BATCH, outputs)
    vectors, log_probs, distances, strangeness = (values.numpy() for values in arrays)
    probabilities = np.exp(log_probs)
    scores = {
        "largest probability": -probabilities.max(1),
        "entropy": -(probabilities * log_probs).sum(1),
    }
    scores |= {
        "energy": vectors[:, -1],
        "Mahalanobis": distances,
        "Mahalanobis and energy": strangeness,
    }
    return vectors[:, :-1], scores


def train(
    arguments: argparse.Namespace, name: str, *words: Any, **flags: Any
) -> tuple[Any, dict[str, float]]:
    """Train a model, and return its pipeline and its metrics."""
    folder = arguments.runs / name
    metrics = harness.train(
        folder, *words, model_name_or_path=arguments.encoder, quantization="none", **flags
    )
    return harness.load_classifier(folder), metrics


def read_texts(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def separation(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Return the AUROC, and the share of unknown texts above 95 % of the known ones, from scores of
    both.
    """
    labels = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
    threshold = np.quantile(known, 1 - STRANGE)
    return {
        "auroc": roc_auc_score(labels, np.r_[known, unknown]),
        "found": float((unknown > threshold).mean()),
    }


def compare(classify: Any, training: list[str], known: list[str], unknown: list[str]) -> list[dict]:
    """Return a row for each score: how well it tells unknown texts from known ones."""
    of_training, _ = run_model(classify, training)
    covariance, _ = ledoit_wolf(of_training.astype(np.float64))
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    center = of_training.mean(0)
    open_world = classify.model.heads.open_world
    parts = []
    flagged = []
    for texts in (known, unknown):
        vectors, scores = run_model(classify, texts)
        cosines = normalize(vectors) @ normalize(of_training).T
        scores["nearest texts"] = 1 - np.partition(cosines, -NEAREST, axis=1)[:, -NEAREST]
        scores["relative Mahalanobis"] = scores["Mahalanobis"] ** 2 - np.square(
            (vectors - center) @ whitening
        ).sum(1)
        parts.append(scores)
        p_values = open_world.p_values(torch.from_numpy(scores["Mahalanobis and energy"]))
        flagged.append((p_values <= STRANGE).double().mean().item())
    rows = [{"score": score, **separation(parts[0][score], parts[1][score])} for score in SCORES]
    rows[-1] |= {"found_by_p_value": flagged[1], "false_alarms": flagged[0]}
    return rows


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


def clinc150(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each run of ``--seed`` on the validation queries, which choose the score, and on the
    test queries.
    """
    files = {
        split: arguments.data / "clinc150" / f"{split}.csv"
        for split in ("train", "validation", "test")
    }
    flags = FLAGS["clinc150"] | {f"{split}_file": file for split, file in files.items()}
    texts = {split: [*read_texts(file)["text"]] for split, file in files.items()}
    runs: list[dict] = []
    for seed in arguments.seed:
        classify, metrics = train(arguments, f"clinc150-{seed}", **flags, seed=seed)
        runs.append({"seed": seed, "accuracy": metrics["test_accuracy"]})
        for split in ("validation", "test"):
            unknown = [
                *read_texts(arguments.data / "clinc150" / f"out_of_scope_{split}.csv")["text"]
            ]
            runs[-1][split] = compare(classify, texts["train"], texts[split], unknown)
    return {"clinc150": runs}


def ohsumed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each run of `LEFT_OUT`."""
    results = {}
    labels = read_texts(arguments.data / "ohsumed" / "labels.csv")
    rows = {
        split: read_texts(arguments.data / "ohsumed" / f"{split}.csv")
        for split in ("train", "test")
    }
    for name, (leaves, branch) in LEFT_OUT.items():
        folder = arguments.runs / f"ohsumed-{name}-files"
        unknown = {*leaves, *branch}
        folder.mkdir(exist_ok=True)
        kept = {split: table[~table["label"].isin(unknown)] for split, table in rows.items()}
        for split, table in kept.items():
            table.to_csv(folder / f"{split}.csv", index=False)
        labels[~labels["label"].isin(unknown)].to_csv(folder / "labels.csv", index=False)
        files = {"train_file": folder / "train.csv", "test_file": folder / "test.csv"}
        files |= {"taxonomy": folder / "labels.csv", "class_names": folder / "labels.csv"}
        recipe = harness.ROOT / "recipes" / "ohsumed.yaml"
        classify, metrics = train(arguments, f"ohsumed-{name}", recipe, **FLAGS["ohsumed"], **files)

        # ── Unknown leaves, and the unknown branch ────────────────────────────────────────────────
        test = rows["test"]
        parts = {
            "leaves": test[test["label"].isin(leaves)],
            "branch": test[test["label"].isin(branch)],
        }
        for part, table in parts.items():
            compared = compare(
                classify,
                list(kept["train"]["text"]),
                list(kept["test"]["text"]),
                list(table["text"]),
            )
            results[f"{name}, {part}"] = {"texts": len(table), "scores": compared}
        measured = {key: metrics[f"test_{key}"] for key in ("accuracy", "strange")}
        results[f"{name}, false alarms"] = measured
    return {"ohsumed": results}


def made_up_texts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the p-value of each made-up text by each model of `ohsumed`."""
    file = harness.ROOT / "benchmarks" / "strange_texts.txt"
    results = {}
    texts = file.read_text(encoding="utf-8").splitlines()
    for name in LEFT_OUT:
        classify = harness.load_classifier(arguments.runs / f"ohsumed-{name}")
        results[name] = [
            {"text": text, **{field: one[field] for field in ("label", "score", "p_value")}}
            for text, one in zip(texts, classify(texts), strict=True)
        ]
    return {"texts": results}


def print_results(results: dict[str, Any]) -> None:
    for run in results.get("clinc150", []):
        for split in ("validation", "test"):
            print(
                f"\nCLINC150, seed {run['seed']}, {split} queries; accuracy on test "
                f"{run['accuracy']:.2%}"
            )
            print_scores(run[split])
    for name, measured in results.get("ohsumed", {}).items():
        print(
            f"\nOHSUMED, {name}: { ({key: measured[key] for key in measured if key != 'scores'}) }"
        )
        print_scores(measured.get("scores", []))
    for name, rows in results.get("texts", {}).items():
        print(f"\nMade-up texts, {name}")
        columns = [("text", "{text:.40}"), ("class", "{label}"), ("probability", "{score:.2f}")]
        harness.print_rows(rows, [*columns, ("p-value", "{p_value:.3f}")], left=2)


def print_scores(rows: list[dict]) -> None:
    harness.print_rows(
        rows, [("score", "{score}"), ("AUROC", "{auroc:.3f}"), ("found", "{found:.1%}")]
    )
    for row in rows:
        if "found_by_p_value" in row:
            shown = (
                f"{row['found_by_p_value']:.1%} of the unknown and {row['false_alarms']:.1%} of "
                "the known texts"
            )
            print(f"\nAt p ≤ {STRANGE}: {shown}")


if __name__ == "__main__":
    main()
