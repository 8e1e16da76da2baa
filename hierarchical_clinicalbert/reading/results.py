"""Turn results of the pipeline into rows of a table, for predict.py and the Space."""

from typing import Any

from hierarchical_clinicalbert.reading.columns import join_labels

# the `RESULT_VERSION` of pipeline_hierarchical.py that is read here; a checkpoint holds its own
# copy of that file
RESULT_VERSION = 3
DIGITS = 6
# columns of `predict.py --probabilities`, by which `train.py --teacher` reads an output
TEXT_HASH = "text_hash"
PROBABILITIES = "probabilities"
PROBABILITY_OF = "probability of "  # and a label, in CSV


def check_version(classifier: Any) -> None:
    """Raise ValueError if the results of a checkpoint's pipeline have the fields of another
    release.
    """
    found = getattr(classifier, "result_version", 1)
    if found != RESULT_VERSION:
        problem = (
            f"its code returns results of version {found}, and this release reads version "
            f"{RESULT_VERSION}"
        )
        raise ValueError(
            f"{problem}: copy the files *_hierarchical.py of this release into the checkpoint"
        )


def to_row(result: dict[str, Any]) -> dict[str, Any]:
    """Build a row from a result: nodes become their labels, and numbers have six digits.

    ``labels``, ``scores``, ``paths`` and ``descriptions`` are lists, and ``label``, ``score`` and
    ``path`` are of the first. There are descriptions if a node has one. ``levels`` are left out.
    """
    nodes = result["labels"]
    row = {name: result[name] for name in ("label", "score")} | {
        "path": names(result["path"]),
        "labels": names(nodes),
    }
    row |= {
        "scores": [node["score"] for node in nodes],
        "paths": [names(node["path"]) for node in nodes],
    }
    if any("description" in node for node in nodes):
        row["descriptions"] = [node.get("description") for node in nodes]
    row |= {name: value for name, value in result.items() if name not in (*row, "levels")}
    if "prediction_set" in row:
        row["prediction_set"] = names(row["prediction_set"])
    return rounded(row)


def names(nodes: list[dict[str, Any]]) -> list[str]:
    return [node["label"] for node in nodes]


def rounded(value: Any) -> Any:
    """Round a number, and the numbers of a list or dictionary."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def join_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Join the lists of a row by `join_labels`, and the nodes of its ``path`` and ``paths`` by `` >
    ``, for a CSV file.
    """

    def cell(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if name == "paths":
            value = [join_labels(path, " > ") for path in value]
        return join_labels(
            ("" if one is None else str(one) for one in value), " > " if name == "path" else "; "
        )

    return {name: cell(name, value) for name, value in row.items()}
