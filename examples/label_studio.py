"""Label in Label Studio the tasks that ``predict.py --output next.tasks.json`` wrote:

    python examples/label_studio.py config CHECKPOINT > config.xml
    python examples/label_studio.py rows CHECKPOINT EXPORT.json > labelled.jsonl

The first command prints the labelling configuration for a checkpoint's taxonomy. The second reads
an export in the format "JSON", and prints training rows for ``train.py``. Their labels are in the
column ``label``, or ``labels`` for a multi-label checkpoint. Tasks that nobody labelled, or that
were skipped, are left out. Of several annotations of a task, the latest counts.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import find_snapshot, is_checkpoint, read_config
from hierarchical_clinicalbert.errors import (
    ArgumentParser,
    InputError,
    as_input_error,
    print_result,
)


def configuration(config: HierarchicalConfig) -> str:
    """Return the labelling configuration as XML. The choices are the labels of the nodes."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Text", name="text", value="$text")
    single = {} if config.is_multi_label else {"maxUsages": "1"}
    elements = {
        -1: ElementTree.SubElement(view, "Taxonomy", name="taxonomy", toName="text", **single)
    }
    tree = config.tree
    for node in tree.reading_order:  # parents first
        elements[node] = ElementTree.SubElement(
            elements[tree.parents[node]], "Choice", value=tree.labels[node]
        )
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode")


def training_row(task: dict[str, Any], is_multi_label: bool) -> dict[str, Any] | None:
    """Return the training row of an exported task, or None if no annotation counts, or a
    single-label task has no label.

    Raises:
        InputError: a single-label task has several labels.
    """
    annotations = [
        annotation for annotation in task["annotations"] if not annotation.get("was_cancelled")
    ]
    if not annotations:
        return None
    latest = max(annotations, key=lambda annotation: annotation.get("updated_at") or "")
    results = [result for result in latest["result"] or [] if result["type"] == "taxonomy"]
    paths = [path for result in results for path in result["value"]["taxonomy"]]
    deepest = (
        path[-1]
        for path in paths
        if not any(path == other[: len(path)] for other in paths if other != path)
    )
    labels = [*dict.fromkeys(deepest)]
    if is_multi_label:
        return {"text": task["data"]["text"], "labels": labels}
    if len(labels) > 1:
        raise InputError(
            f"the task {task.get('id', 'without id')} has {len(labels)} labels, and its "
            "model predicts one"
        )
    return {"text": task["data"]["text"], "label": labels[0]} if labels else None


def main() -> str:
    """Return the configuration, or the rows as JSON Lines."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("config", "rows"))
    parser.add_argument("checkpoint", help="a folder, or an id on the Hub")
    parser.add_argument("export", nargs="?", help="the export, for rows")
    arguments = parser.parse_args()
    with as_input_error(f"cannot read the checkpoint {arguments.checkpoint}"):
        folder = find_snapshot(arguments.checkpoint, None) or arguments.checkpoint
        if not is_checkpoint(folder):
            raise ValueError("it is not a checkpoint of this project")
        config = read_config(folder)
    if arguments.action == "config":
        return configuration(config) + "\n"
    if arguments.export is None:
        raise InputError("rows needs a checkpoint and an export")
    with as_input_error(f"{arguments.export} is not an export in the format JSON"):
        tasks = json.loads(Path(arguments.export).read_text(encoding="utf-8-sig"))
        if not (
            isinstance(tasks, list)
            and all(
                isinstance(task, dict) and isinstance(task.get("annotations"), list)
                for task in tasks
            )
            and all("text" in task.get("data", {}) for task in tasks)
        ):
            raise ValueError("it must be a list of tasks with annotations and a text")
        rows = [row for task in tasks if (row := training_row(task, config.is_multi_label))]
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    print_result("label_studio.py", main)
