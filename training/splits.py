"""Texts and labels, from files to training, validation and test rows.

Worth knowing:

1. Two texts are the same when `normalise_text` makes the same of them. A text is in one split alone: training rows whose text
   is also in a validation or test file are dropped, and so are validation rows whose text is in the test file.
2. A text that an earlier run of a checkpoint was trained on is never scored: it goes to the training rows, or is left out.
3. The report counts what limits any classifier: duplicates, texts with several labels, and the accuracy these allow.
4. The column ``row`` counts the rows of a source from 0, without the header.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pandas as pd

from errors import InputError
from taxonomy_hierarchical import Taxonomy, quote_name
from training.arguments import DataArguments
from training.data_report import SPLITS, describe, log_what_was_done, parts, shared_texts, untrained_classes
from training.labels import resolve_labels
from training.sources import SplitSource, find_columns, find_split_sources, read_rows
from training.trained_texts import UNTRAINED, TrainedTexts, normalise_text, text_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSplits:
    """Data ready to be tokenized.

    Attributes:
        splits: ``train``, ``validation`` and ``test``, those there are, each with the columns ``text`` (str), ``label``
            (int, a node of the taxonomy) and ``row`` (int, its row in the source, from 0).
        taxonomy: the one that the labels are ids of.
        report: ready for JSON: ``sources`` with their SHA-256, ``columns``, where the ``taxonomy`` comes from, how the
            ``split`` was made, the counts of each of the ``splits`` (see `training.data_report.describe`), ``shared_texts`` of each two
            splits before any row was dropped, ``classes_without_training_rows``, and what was ``trained_before``: whether the
            ``scores`` are verified, the number of ``texts``, the ``rows`` of each split as given that have such a text, and
            where those of validation and test were ``moved``.
    """

    splits: datasets.DatasetDict
    taxonomy: Taxonomy
    report: dict


def load_splits(
    arguments: DataArguments,
    seed: int,
    taxonomy: Taxonomy | None = None,
    trained: TrainedTexts = UNTRAINED,
) -> LabelledSplits:
    """Read, check and split the data that the arguments name.

    Args:
        arguments: where the data are and what their labels mean.
        seed: of the splits that are carved.
        taxonomy: of a finished checkpoint. It takes precedence over ``arguments.taxonomy``.
        trained: the texts that the checkpoint has been trained on. If not all are known, no rows are carved.

    Raises:
        InputError: no source or contradictory ones, a file that cannot be read, missing texts or labels, a label that
            the taxonomy does not hold, too few rows to split.
    """
    # ── read ──
    _check_sizes(arguments)
    sources, single = find_split_sources(arguments)
    columns = find_columns(sources.values(), arguments)
    text_column, *label_columns = next(iter(columns.values()))  # other sources may spell them in another case
    logger.info("columns: text %s, label %s", quote_name(text_column), ", ".join(map(quote_name, label_columns)))

    rows, places = read_rows(sources, columns)

    # ── label ──
    taxonomy, origin, nodes = resolve_labels(places, len(rows), label_columns, arguments, taxonomy)
    rows["label"] = [nodes[label] for label in rows["label"]]

    # ── split ──
    rows["text_id"], texts = pd.factorize(pd.Series(map(normalise_text, rows["text"]), dtype=object))
    rows["trained"] = _is_trained(rows, texts, trained)
    trained_before = _report_trained(rows, trained)
    rows = _move_trained(rows)
    rows, dropped = _drop_shared(rows)
    shares = _shares_to_carve(arguments, sources, single) if trained.complete else {}
    rows = _carve(rows, shares, seed)

    # ── report ──
    report = {
        "sources": [
            {"split": "all" if single else split, "name": source.name, "sha256": source.sha256}
            for split, source in sources.items()
        ],
        "columns": {"text": text_column, "label": label_columns},
        "taxonomy": origin,
        "split": {
            "method": "by class, identical texts kept together" if shares else "as given",
            "carved": shares,
            "seed": seed,
            # by which a resumed run knows the rows that it was trained on
            **({"train_rows_sha256": hash_of_rows(rows.loc[rows["split"] == "train", "row"])} if shares else {}),
        },
        "splits": {
            split: describe(part, taxonomy, int((dropped["split"] == split).sum()))
            for split, part in parts(rows).items()
        },
        "trained_before": trained_before,
        "shared_texts": shared_texts(pd.concat([rows, dropped])),
        "classes_without_training_rows": untrained_classes(rows, taxonomy),
    }
    log_what_was_done(report)
    return LabelledSplits(_to_datasets(rows), taxonomy, report)


def _check_sizes(arguments: DataArguments) -> None:
    for flag in ("validation_size", "test_size"):
        if not 0 <= getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is a share of the rows, from 0 to below 1, not {getattr(arguments, flag)}")
    if arguments.validation_size + arguments.test_size >= 1:
        raise InputError(
            f"--validation_size {arguments.validation_size} and --test_size {arguments.test_size} "
            "leave nothing to train on"
        )


def _is_trained(rows: pd.DataFrame, texts: pd.Index, trained: TrainedTexts) -> np.ndarray:
    """Return a mask (N,) of the rows whose text an earlier run was trained on.

    For training rows, which may be carved, only the runs before a resumed one count. For other rows its own part counts too.
    """
    if not trained.all:
        return np.zeros(len(rows), dtype=bool)
    hashes = [text_hash(text) for text in texts]
    earlier, ever = (np.array([one in known for one in hashes]) for known in (trained.earlier, trained.all))
    ids = rows["text_id"].to_numpy()
    return np.where(rows["split"] == "train", earlier[ids], ever[ids])


def _report_trained(rows: pd.DataFrame, trained: TrainedTexts) -> dict[str, Any]:
    return {
        "scores": "verified" if trained.complete else "unverified",
        "texts": len(trained.earlier),
        "rows": {split: int(part["trained"].sum()) for split, part in parts(rows).items()},
        "moved": "to train" if (rows["split"] == "train").any() else "left out",
    }


def _move_trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Move held-out rows whose text was trained on to the training rows, or drop them if there are none."""
    held_out = rows["trained"] & (rows["split"] != "train")
    if not (rows["split"] == "train").any():
        return rows[~held_out].reset_index(drop=True)
    return rows.assign(split=rows["split"].where(~held_out, "train"))


def _drop_shared(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows that stay, and those whose text is also in a later split: train, validation, test."""
    dropped = pd.Series(False, index=rows.index)
    for place, split in enumerate(SPLITS[:-1]):
        own, later = rows["split"] == split, rows["split"].isin(SPLITS[place + 1 :])
        shared = own & rows["text_id"].isin(rows.loc[later, "text_id"].unique())
        if own.any() and shared.sum() == own.sum():
            others = " or ".join(SPLITS[place + 1 :])
            raise InputError(f"every {split} text is also in {others}: nothing is left of the {split} rows")
        dropped |= shared
    return rows[~dropped].reset_index(drop=True), rows[dropped]


def hash_of_rows(numbers: pd.Series) -> str:
    return hashlib.sha256(np.sort(numbers.to_numpy(np.int64)).tobytes()).hexdigest()


def _shares_to_carve(arguments: DataArguments, sources: dict[str, SplitSource], single: bool) -> dict[str, float]:
    shares = {}
    if single and arguments.test_size:
        shares["test"] = arguments.test_size
    if "train" in sources and "validation" not in sources and arguments.validation_size:
        shares["validation"] = arguments.validation_size
    return shares


def _carve(rows: pd.DataFrame, shares: dict[str, float], seed: int) -> pd.DataFrame:
    """Move shares of the training texts, each with all its rows, to other splits.

    Texts that an earlier run was trained on stay. If too few others are left, the splits get their shares of these.
    """
    # scikit-learn's StratifiedGroupKFold loops over the groups, and knows only equal folds; its train_test_split
    # refuses a class with a single text, and fewer held-out texts than classes
    generator = np.random.default_rng(seed)
    rows = rows.copy()
    trained = rows.loc[rows["split"] == "train"].groupby("text_id")["trained"].any()
    counts = {split: round(share * len(trained)) for split, share in shares.items()}
    if trained.any() and (~trained).sum() < sum(counts.values()):
        counts = {split: count * int((~trained).sum()) // sum(counts.values()) for split, count in counts.items()}
    for split, count in counts.items():
        train = rows["split"] == "train"
        label_of = _most_common_labels(rows[train])
        may_not = trained[label_of.index].to_numpy()
        held_out = label_of.index[_sample(label_of.to_numpy(), count, split, generator, may_not)]
        rows.loc[train & rows["text_id"].isin(held_out), "split"] = split
    return rows


def _most_common_labels(rows: pd.DataFrame) -> pd.Series:
    """Return for each text id the label of most of its rows; of several that are as common, the smallest."""
    counts = rows.groupby(["text_id", "label"]).size().reset_index(name="rows")
    counts = counts.sort_values(["text_id", "rows", "label"], ascending=[True, False, True])
    return counts.drop_duplicates("text_id").set_index("text_id")["label"]


def _sample(
    strata: np.ndarray, count: int, split: str, generator: np.random.Generator, trained: np.ndarray
) -> np.ndarray:
    """Draw a mask (N,) of ``count`` texts. Every stratum gives its share, rounded up or down, but never all it has.

    Texts that were trained on before (N,) stay. If too few others are left for ``count``, all that can be are drawn.

    This is systematic sampling along the texts in order of their stratum (Cochran, Sampling Techniques, 1977,
    chapter 8). Strata of one text give none. A share of at most a half, rounded up, leaves a text of any other; of a larger
    share one text of each stratum is set aside beforehand.
    """
    order = generator.permutation(len(strata))
    rank = generator.permutation(strata.max() + 1)
    order = order[np.argsort(rank[strata[order]], kind="stable")]
    keeps = (np.bincount(strata, trained) > 0)[strata[order]]  # has a text that stays anyway
    several = ((np.bincount(strata)[strata[order]] > 1) | keeps) & ~trained[order]
    not_first = ((np.diff(strata[order], prepend=-1) == 0) | keeps) & ~trained[order]
    eligible = several if 2 * count <= several.sum() else not_first
    if trained.any():
        count = min(count, int(eligible.sum()))
        if not count:
            raise InputError(
                f"cannot carve {split} rows: the checkpoint was trained on {trained.sum():,} of {len(strata):,} distinct "
                f"training texts, and none of the others can be spared; give --{split}_file, or --{split}_size 0"
            )
    if not 0 < count <= eligible.sum():
        raise InputError(
            f"cannot carve {split} rows: {count} of {len(strata)} distinct training texts, of which one a class must "
            f"stay; change --{split}_size, or 0 for no {split} rows"
        )
    ticks = np.floor(np.cumsum(eligible) * (count / eligible.sum()) + 0.5)
    mask = np.zeros(len(strata), dtype=bool)
    mask[order] = np.diff(ticks, prepend=0) > 0
    return mask


def _to_datasets(rows: pd.DataFrame) -> datasets.DatasetDict:
    # large_string: a string column of Arrow ends at 2 GB
    features = datasets.Features(
        {
            "text": datasets.Value("large_string"),
            "label": datasets.Value("int64"),
            "row": datasets.Value("int64"),
            "text_id": datasets.Value("int64"),
        }
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_pandas(part[list(features)], features=features, preserve_index=False)
            for split, part in parts(rows).items()
        }
    )
