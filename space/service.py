"""Serve one model to the page and the API: the functions that both call, and the runs of files.

Worth knowing:

1. The functions of the API are typed, and `gr.api` shows the types. The functions of the page
   return the outputs of one event. gradio ends the run of a file where the user cancels it, between
   two of its outputs.
2. A refusal is a message beside its cause. The pop-ups of gradio render HTML, so they never show
   input of a user.
3. `Service` serves a single-path model, and `MultiLabelService` a multi-label model. In this file,
   the target of the guarantee is a coverage for the first, and a recall for the second.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

try:
    import spaces  # on ZeroGPU hardware; it must be imported before torch
except ImportError:
    spaces = None

import gradio as gr
import views
from attribution import Explainer, Explanation
from classification import MIN_TARGET, Classification, check_target, check_text, highest_target
from gradio.utils import get_upload_folder
from retention import KEPT_SECONDS
from tables import (
    MAX_BYTES,
    MAX_CHARACTERS,
    File,
    Refused,
    TextRow,
    read_table,
    to_csv,
    to_json_lines,
)
from transformers import Pipeline

from hierarchical_clinicalbert.reading.results import to_row
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

CHARACTERS_PER_TOKEN = 8  # most texts have fewer
ROWS_AT_ONCE = 32  # of a file
# between two progress messages: with more, a slow browser becomes unresponsive
PROGRESS_SECONDS = 0.5


class Problem(TypedDict):
    """A row that was not classified: the line where it begins, and the reason."""

    line: int
    problem: str


class ClassifiedRow(TypedDict, total=False):
    """A row that was classified: its first line, its text, and the fields of its `Classification`
    with nodes as labels.

    ``result_version`` counts the changes of these fields.
    """

    line: int
    text: str
    result_version: int
    label: str | None
    score: float | None
    path: list[str]
    labels: list[str]
    scores: list[float]
    paths: list[list[str]]
    p_value: float
    prediction_set: list[str]
    tokens: int
    tokens_read: int
    truncated: bool


class FileResult(TypedDict):
    """The results of a file: the column of texts, the rows that were classified, and those that
    were not.
    """

    column: str
    rows: list[ClassifiedRow]
    problems: list[Problem]


def gpu(function: Callable) -> Callable:
    """Run a function with a GPU on ZeroGPU hardware. Elsewhere, return it unchanged."""
    return function if spaces is None else spaces.GPU(function)


def take_uploads(paths: list[str]) -> list[File]:
    """Read uploaded files and delete them.

    Raises:
        Refused: one is not an upload, or was deleted; or of several, one is not a text, or they are
            too large together.
    """
    files: list[File] = []
    for path in paths:
        file = Path(path).resolve()
        if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
            raise Refused(
                "The file was deleted after it was read, or never arrived: upload it again."
            )
        files.append((file.name, file.read_bytes()))
        file.unlink(missing_ok=True)
    if len(files) > 1 and not all(name.lower().endswith(".txt") for name, _ in files):
        raise Refused("Of several files, each must be a text (.txt).")
    if sum(len(content) for _, content in files) > MAX_BYTES:
        raise Refused(f"The files have more than {MAX_BYTES // 2**20} MB.")
    return files


class Service:
    """The functions of the page and the API for one model.

    Args:
        classifier: as `classification.load` returns it.
    """

    target_label = "Coverage: the share of texts whose prediction set contains the correct class"
    target_info = "A higher coverage needs more classes in the set, or nodes above them."
    unit = views.PROBABILITY

    def __init__(self, classifier: Pipeline):
        self.classifier = classifier
        self.tree = classifier.tree
        self.guarantee = classifier.decisions.guarantee
        self.max_characters = max(
            MAX_CHARACTERS, CHARACTERS_PER_TOKEN * classifier.tokenizer.model_max_length
        )
        self.thresholds = classifier.decisions.node_thresholds(
            classifier.model.config.calibration.thresholds
        )
        # what the page shows, see `HierarchicalConfig`; the checkpoint's own code has another class
        # Taxonomy
        medical = self.tree.to_nested() == Taxonomy(DEFAULT_TAXONOMY).to_nested()
        self.page = {
            "title": "Text, sorted into a taxonomy",
            "medical": medical,
        } | classifier.model.config.page
        # on ZeroGPU, these run in another process, which hides error messages
        self._run_pipeline = gpu(lambda texts, options: classifier(texts, **options))
        self._explain = gpu(Explainer(classifier).explain)

    # ── The API ───────────────────────────────────────────────────────────────────────────────────

    def classify(
        self, text: str, coverage: float | None = None, levels: bool = False
    ) -> Classification:
        """Classify a text into the taxonomy.

        Args:
            text: at most 20,000 characters.
            coverage: between 0.5 and 0.99; the result then has a prediction set with this coverage.
            levels: whether the result has the probability of every node.
        """
        return self._classify(text, coverage, levels)

    def explain(self, text: str, node: str | None = None) -> Explanation:
        """Attribute the probability of a node to the words of a text, by integrated gradients.

        Args:
            text: at most 20,000 characters.
            node: the label of any node of the taxonomy; by default the first predicted one, or the
                most probable root.

        Returns:
            The node, its probability for the text and for a blank text, and the words with their
            weights. The weights add up to the difference of the two probabilities, or for
            multi-label models of their log-odds, up to the convergence error.
        """
        text = check_text(text, self.max_characters)
        return self._explain(
            text,
            self.check_node(node) if node else self.main_node(self._classify(text, None, True)),
        )

    def classify_file(
        self,
        file: gr.FileData,
        column: str | None = None,
        coverage: float | None = None,
        encoding: str | None = None,
    ) -> FileResult:
        """Classify the rows of a file. The file is deleted as soon as it is read.

        Args:
            file: CSV, TSV, JSON, JSON Lines, Parquet, or plain text with one text a line; at most
                10 MB and 10,000 rows.
            column: the column of texts; by default found by its name, such as text or abstract,
                else the one with the most characters.
            coverage: as in classify.
            encoding: of a text file, such as cp1252; by default UTF-8.
        """
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise Refused("A file is needed.")
        table = read_table(
            take_uploads([file["path"]]), column or None, self.max_characters, encoding
        )
        if coverage is not None:
            check_target(self.classifier, coverage)
        result: dict[str, Any] = {"column": table.column, "rows": [], "problems": []}
        for records, problems in self._classify_rows(table.rows, coverage):
            result["rows"] += records
            result["problems"] += problems
        return result

    def _classify_rows(
        self, rows: list[TextRow], target: float | None
    ) -> Iterator[tuple[list[dict[str, Any]], list[Problem]]]:
        """Classify rows, `ROWS_AT_ONCE` at a time.

        Yield those that were classified and those that were not.
        """
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            problems: list[Problem] = [
                {"line": row.line, "problem": row.problem} for row in some if row.problem
            ]
            texts = [(row.line, row.text) for row in some if not row.problem]
            results = self._classify_all([text for _, text in texts], target)
            records = [
                {
                    "line": line,
                    "text": text,
                    "result_version": self.classifier.result_version,
                    **to_row(result),
                }
                for (line, text), result in zip(texts, results, strict=True)
            ]
            yield records, problems

    def _classify(self, text: Any, target: Any, levels: bool) -> Any:
        if target is not None:
            check_target(self.classifier, target)
        return self._classify_all([check_text(text, self.max_characters)], target, levels)[0]

    def _classify_all(
        self, texts: list[str], target: float | None, levels: bool = False
    ) -> list[Any]:
        options = {"levels": levels} | ({} if target is None else {self.guarantee: target})
        return self._run_pipeline(texts, options)

    def check_node(self, node: Any) -> str:
        if node not in self.tree.labels:
            raise Refused("The taxonomy has no such node.")
        return node

    # ── The page ──────────────────────────────────────────────────────────────────────────────────

    def show_result(self, text: str, target: float | None) -> list[Any]:
        """Return the outputs of one text: the text if it was classified, its result, the tree,
        and the node to explain.
        """
        no_set = ""
        try:
            check_target(self.classifier, target)  # an empty box is None
        except Refused as error:
            target = None
            no_set = views.escape_html(str(error))
        try:
            result = self._classify(text or "", target, True)
        except Refused as error:
            return ["", views.refusal(str(error)), views.tree(self.tree), ""]
        held = no_set or views.prediction_set(
            self.tree, self.guarantee, target, result["prediction_set"]
        )
        tree = views.tree(self.tree, self.node_results(result))
        return [text, views.result(self.tree, result, held), tree, self.main_node(result)]

    def node_results(self, result: dict[str, Any]) -> views.NodeResults:
        """Return what a result with levels says about the nodes.

        Of a strange text, nothing counts as predicted.
        """
        by_label = {label: score for level in result["levels"] for label, score in level.items()}
        marked = {} if views.is_strange(result) else result
        predicted, in_set = (
            [self.tree.id(node["label"]) for node in marked.get(name, [])]
            for name in ("labels", "prediction_set")
        )
        scores = [by_label[label] for label in self.tree.labels]
        return views.NodeResults(
            scores, self.tree.with_ancestors(predicted), {*in_set}, self.thresholds
        )

    def show_result_again(self, text: str, target: float | None) -> Any:
        """Return result and tree of a text for a changed target.

        Without a text or a target, they stay as they are.
        """
        has_text = isinstance(text, str) and text.strip()
        return (
            self.show_result(text, target)[1:3]
            if has_text and target is not None
            else [gr.skip()] * 2
        )

    def show_nothing(self) -> list[Any]:
        """Return the outputs of `show_result` before a text is classified."""
        return ["", views.waiting(), views.tree(self.tree), ""]

    def main_node(self, result: dict[str, Any]) -> str:
        """Return the label of the node that is explained by default: the first predicted one, or
        the most probable root.
        """
        roots = result["levels"][0]
        return result["label"] or max(roots, key=roots.get)

    def show_words(self, text: str, node: str) -> str:
        """Return the text with the weights of its words for a node, or a placeholder if no text
        was classified.
        """
        if not text:
            return views.no_words()
        try:
            text = check_text(text, self.max_characters)
            node = self.check_node(node)
        except Refused as error:
            return views.refusal(str(error), "Not explained")
        return views.words(text, self._explain(text, node), self.unit)

    def open_file(
        self, paths: list[str] | None, kept: list[File] | None, encoding: str | None
    ) -> list[Any]:
        """Read uploads into memory, if nothing is kept.

        Return what is kept, its columns, and cleared outputs of `run_file`.
        """
        columns = gr.Dropdown(choices=[], value=None)
        state = views.progress(0, 0, 0, "No file yet.")
        try:
            if kept := kept or (take_uploads(paths) if paths else None):
                table = read_table(kept, length=self.max_characters, encoding=encoding)
                columns = gr.Dropdown(choices=table.columns, value=table.column)
                problems = sum(row.problem is not None for row in table.rows)
                state = views.progress(
                    0, len(table.rows), problems, "Read, and deleted from the disk. Classified:"
                )
        except Refused as error:
            state = views.refusal(str(error), "Not read")
        return [kept, columns, *self.show_no_rows(state)]

    def show_no_rows(self, state: str) -> list[Any]:
        """Return the outputs of `run_file` without rows: a status line, and all else cleared."""
        return [state, *self.show_rows([], []), *[gr.DownloadButton(interactive=False)] * 2, None]

    def show_rows(self, records: list[dict[str, Any]], problems: list[Problem]) -> list[str]:
        """Return the summary of the rows that were classified, the first page of them, and the
        rows that were not.
        """
        return [
            views.summary(self.tree, records),
            views.table(self.tree, records[: views.PAGE]),
            views.problems(problems),
        ]

    def turn_page(self, rows: list[dict[str, Any]] | None, page: str) -> list[Any]:
        """Return a page of the rows that were classified, which are kept as long as a file is.

        Empty the box of the page.
        """
        return [views.table(self.tree, rows, str(page)) if rows and page else gr.skip(), ""]

    def cancel_file(self, rows: list[dict[str, Any]] | None) -> list[Any]:
        """Return the outputs of a run that gradio has ended.

        A run with all rows is done, and stays as it is.
        """
        cancelled = views.progress(0, 0, 0, "Cancelled. No results are kept.")
        return self.show_no_rows(cancelled) if rows is None else [gr.skip()] * 7

    def run_file(
        self, kept: list[File] | None, column: str, target: float | None, encoding: str | None
    ) -> Iterator[list[Any]]:
        """Classify a file.

        Yield progress, summary, the first page of rows, problems, two downloads, and in the end all
        rows for `turn_page`.
        """
        # ── Read: the file may be refused ─────────────────────────────────────────────────────────
        try:
            if kept is None:
                raise Refused(
                    f"There is no file: choose one. It is kept for {KEPT_SECONDS // 60} minutes."
                )
            if highest_target(self.classifier) >= MIN_TARGET:
                check_target(self.classifier, target)
            else:  # nobody could move the slider
                target = None
            table = read_table(kept, column or "", self.max_characters, encoding)
        except Refused as error:
            yield self.show_no_rows(views.refusal(str(error)))
            return

        # ── Classify: some rows at a time; gradio sends only what has changed ─────────────────────
        done: list[dict[str, Any]] = []
        bad: list[Problem] = []
        total = len(table.rows)
        sent = float("-inf")
        yield self.show_no_rows(views.progress(0, total, 0, "Classified"))
        for records, problems in self._classify_rows(table.rows, target):
            done += records
            bad += problems
            if time.monotonic() - sent >= PROGRESS_SECONDS or len(done) + len(bad) == total:
                state = views.progress(len(done) + len(bad), total, len(bad), "Classified")
                yield [state, *self.show_rows(done, bad), *[gr.skip()] * 3]
                sent = time.monotonic()

        # ── Write: two files to download ──────────────────────────────────────────────────────────
        with tempfile.TemporaryDirectory() as folder:  # gradio serves copies
            files = Path(folder, "predictions.csv"), Path(folder, "predictions.jsonl")
            # without a byte order mark, spreadsheets may read a CSV file in a local encoding
            files[0].write_text(to_csv(done), encoding="utf-8-sig", newline="")
            files[1].write_text(to_json_lines(done), encoding="utf-8", newline="")
            downloads = [gr.DownloadButton(value=str(file), interactive=True) for file in files]
            state = views.progress(total, total, len(bad), "Done:")
            first = views.table(self.tree, done)
            yield [state, gr.skip(), first, gr.skip(), *downloads, done]


class MultiLabelService(Service):
    """The functions for a multi-label model."""

    target_label = (
        "Recall: the share of a text's correct nodes that the prediction set contains on average"
    )
    target_info = "A higher recall needs more nodes in the set."
    unit = views.LOG_ODDS

    def classify(
        self, text: str, recall: float | None = None, levels: bool = False
    ) -> Classification:
        return self._classify(text, recall, levels)

    def classify_file(
        self,
        file: gr.FileData,
        column: str | None = None,
        recall: float | None = None,
        encoding: str | None = None,
    ) -> FileResult:
        return super().classify_file(file, column, recall, encoding)


# by the guarantee of the model's decisions
SERVICES = {"coverage": Service, "recall": MultiLabelService}
