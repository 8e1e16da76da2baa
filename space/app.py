"""Serve a checkpoint as a page and an API: the path of an abstract, its probabilities, and the contributions of its words.

    python space/app.py --model results/quickstart

Worth knowing:

1. On a hosted Space the variables MODEL_ID and MODEL_REVISION name the model; push_to_hub.py sets them. The Space imports
   only `reading` of this repository. The model and its pipeline are loaded through transformers.
2. The page and the API call the same functions. Those of the API are typed, and `gr.api` shows the types.
3. A refusal is a message beside its cause. The pop-ups of gradio render HTML, so they never show input of a user.
4. An upload is read into memory and deleted at once. Downloads and what is left of broken uploads are deleted after
   `KEPT_SECONDS`, and when the page stops. Nothing that a user sends is logged: see `log_without_values` and `guard.py`.
5. Texts, explanations and files have separate queues, so a text never waits for a file.
6. `Service` serves a single-path model, and `MultiLabelService` a multi-label model. In this file, the target of the guarantee
   is a coverage for the first, and a recall for the second.
"""

import argparse
import atexit
import inspect
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypedDict

# before gradio is imported: send no analytics, and keep none in memory, because each request would aggregate them again
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
# a private folder for uploads and downloads: the default folder may belong to another user
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="space-")

try:
    import spaces  # on ZeroGPU hardware; it must be imported before torch
except ImportError:
    spaces = None

if not (port := os.environ.get("GRADIO_SERVER_PORT", "7860")).isdecimal() or int(port) > 65535:  # gradio reads it
    print(f"app.py: error: GRADIO_SERVER_PORT must be a number up to 65535, not {port}", file=sys.stderr)
    sys.exit(2)

import gradio as gr
import views
from attribution import Explainer, Explanation
from classification import (
    MAX_CHARACTERS,
    MAX_TARGET,
    MIN_TARGET,
    Classification,
    MultiLabelClassification,
    check_target,
    check_text,
    classify_all,
    guarantee,
    highest_target,
    is_calibrated,
    load,
)
from gradio.utils import get_upload_folder
from guard import Guard, harden_gradio
from starlette.middleware import Middleware
from tables import KINDS, MAX_BYTES, MAX_ROWS, Refused, Row, join_lists, kind_of, read_table, to_csv, to_json_lines
from transformers import Pipeline
from transformers.utils import cached_file

atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

ROWS_BETWEEN_CHECKS = 32  # of a file, for cancellation
PROGRESS_SECONDS = 0.5  # between two progress messages: with more, a slow browser becomes unresponsive
PREVIEW = 50  # rows of a file
KEPT_SECONDS = 600  # until a download is deleted
SWEEP_SECONDS = 60  # between two searches for files to delete
MAX_WAITING = 100  # requests; to more, gradio replies "Queue is full! Please try again."
START_TARGET = 0.9  # of the guarantee
EXAMPLES = {
    "Colitis": "Whether mesalamine keeps ulcerative colitis quiet after a first attack was asked in 148 outpatients. All "
    "underwent colonoscopy with biopsy at entry and after one year. Mucosal inflammation returned in 31 % under treatment "
    "and in 58 % under placebo. Two patients were withdrawn for an unrelated cardiac arrhythmia. Maintenance treatment "
    "of the inflamed bowel is supported.",
    "Stroke or heart": "We followed 212 patients with atrial fibrillation for three years after a transient ischemic "
    "attack. Anticoagulation halved the rate of cerebral infarction. Left atrial size and blood pressure predicted "
    "recurrence, while carotid stenosis did not. Neurological deficits and myocardial function were assessed every six "
    "months. Whether treatment should be decided by the heart or by the brain remains open.",
    "Sepsis": "Blood cultures of 97 newborns with suspected sepsis were reviewed. Gram-negative organisms grew in 41. Fever was "
    "absent in a third of them, and the white cell count was of little help. Delayed antibiotics were associated with a "
    "longer stay in hospital. Early treatment of every newborn at risk is advised until cultures are known.",
}
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}  # for events: no spinner, no endpoint


class Problem(TypedDict):
    """A row that was not classified: the line where it begins, and the reason."""

    line: int
    problem: str


class Record(TypedDict):
    """A row that was classified: its first line, text, predicted leaf, probability, path, answer and share that was read."""

    line: int
    text: str
    predicted: str
    probability: float
    path: list[str]
    answer: list[str] | None
    share_read: float


class FileResult(TypedDict):
    """The results of a file: the column of texts, the rows that were classified, and those that were not."""

    column: str
    rows: list[Record]
    problems: list[Problem]


class MultiLabelRecord(TypedDict):
    """A row that was classified: its first line, text, predicted nodes, their scores, answer and share that was read."""

    line: int
    text: str
    labels: list[str]
    scores: list[float]
    answer: list[str] | None
    share_read: float


class MultiLabelFileResult(TypedDict):
    """The results of a file: the column of texts, the rows that were classified, and those that were not."""

    column: str
    rows: list[MultiLabelRecord]
    problems: list[Problem]


def gpu(function: Callable) -> Callable:
    """Run a function with a GPU on ZeroGPU hardware. Elsewhere, return it unchanged."""
    return function if spaces is None else spaces.GPU(function)


def take_upload(path: str) -> bytes:
    """Read an uploaded file and delete it.

    Raises:
        Refused: the file is not an upload, or was deleted.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
        raise Refused("The file was deleted after it was read, or never arrived: upload it again.")
    try:
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


class Run:
    """The classification of a file, until it is done or cancelled."""

    def __init__(self) -> None:
        self._ended = threading.Lock()

    @property
    def active(self) -> bool:
        return not self._ended.locked()

    def end(self) -> bool:
        """End the run. Return True for the first caller only, so that a run is either done or cancelled."""
        return self._ended.acquire(blocking=False)


class Service:
    """The functions of the page and the API for one model.

    Args:
        classifier: as `classification.load` returns it.
    """

    kicker = "Most probable class"
    target_label = "Coverage: the share of texts whose answer contains the correct class"
    target_info = "A higher coverage needs more classes in the answer, or nodes above them."
    plots: tuple[tuple[str, str, str], ...] = (  # element, heading, and label of each figure
        ("bars", "Probabilities, level by level", "Probabilities"),
        ("icicle", "The taxonomy: probability from the roots to the leaves", "The taxonomy"),
    )
    answer, preview = staticmethod(views.coverage_answer), staticmethod(views.preview)
    to_csv = staticmethod(to_csv)

    def __init__(self, classifier: Pipeline):
        self.classifier, self.tree = classifier, classifier.tree
        # on ZeroGPU, these run in another process, to which no functions can be passed and which hides error messages
        self._classify_all = gpu(lambda texts, target: classify_all(classifier, texts, target))
        self._explain = gpu(Explainer(classifier).explain)

    # ── The API ──

    def classify(self, text: str, coverage: float | None = None) -> Classification:
        """Classify a text into the taxonomy.

        Args:
            text: at most 20,000 characters.
            coverage: between 0.5 and 0.99; the answer then contains the correct leaf for this share of texts.

        Returns:
            - the most probable leaf, its probability and its path;
            - the answer for the coverage;
            - the probability of every node, level by level;
            - the number of characters that were read.
        """
        return self._classify(text, coverage)

    def explain(self, text: str, node: str | None = None) -> Explanation:
        """Attribute the probability of a node to the words of a text, by integrated gradients.

        Args:
            text: at most 20,000 characters.
            node: the label of any node of the taxonomy; by default the first predicted one, or the most probable root.

        Returns:
            The node, its probability for the text and for a blank text, and the words with their weights. The weights add up
            to the difference of the two probabilities, or for multi-label models of their log-odds, up to the convergence error.
        """
        text = check_text(text)
        return self._explain(text, self.check_node(node) if node else self.main_node(self._classify(text, None)))

    def classify_file(self, file: gr.FileData, column: str | None = None, coverage: float | None = None) -> FileResult:
        """Classify the rows of a file. The file is deleted as soon as it is read.

        Args:
            file: CSV, TSV, JSON, JSON Lines, Parquet, or plain text with one text a line; at most 10 MB and 10,000 rows.
            column: the column of texts; by default found by its name, such as text or abstract, else the one with the most
                characters.
            coverage: as in classify.

        Returns:
            The column, the rows that were classified, and the lines and reasons of the others.
        """
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise Refused("A file is needed.")
        table = read_table(take_upload(file["path"]), kind_of(file["path"]), column or None)
        target = check_target(self.classifier, coverage)
        result: dict[str, Any] = {"column": table.column, "rows": [], "problems": []}
        for records, problems in self._classify_rows(table.rows, target):
            result["rows"] += records
            result["problems"] += problems
        return result

    def _classify_rows(
        self, rows: list[Row], target: float | None
    ) -> Iterator[tuple[list[dict[str, Any]], list[Problem]]]:
        """Classify rows, `ROWS_BETWEEN_CHECKS` at a time. Yield those that were classified and those that were not."""
        for start in range(0, len(rows), ROWS_BETWEEN_CHECKS):
            texts, problems = [], []
            for row in rows[start : start + ROWS_BETWEEN_CHECKS]:
                try:
                    if row.problem is not None:
                        raise Refused(row.problem)
                    texts.append((row.line, check_text(row.text)))
                except Refused as error:
                    problems.append({"line": row.line, "problem": str(error)})
            results = self._classify_all([text for _, text in texts], target) if texts else []
            records = [
                {
                    "line": line,
                    "text": text,
                    **self.outcome(result),
                    "answer": None if result["answer"] is None else [node["label"] for node in result["answer"]],
                    "share_read": round(result["characters_read"] / result["characters"], 4),
                }
                for (line, text), result in zip(texts, results, strict=True)
            ]
            yield records, problems

    def _classify(self, text: Any, target: Any) -> Any:
        target = check_target(self.classifier, target)
        return self._classify_all([check_text(text)], target)[0]

    def check_node(self, node: Any) -> str:
        if node not in self.tree.labels:
            raise Refused("The taxonomy has no such node.")
        return node

    # ── The page ──

    def show_result(self, text: str, target: float) -> list[Any]:
        """Return the outputs of one text: its result, its figures, the node to explain, and an empty explanation."""
        no_answer = ""
        try:
            target = check_target(self.classifier, target)
        except Refused as error:
            target, no_answer = None, views.escape_html(str(error))
        try:
            result = self._classify(text or "", target)
        except Refused as error:
            return [views.refusal(str(error)), *self.figures(), gr.skip(), views.no_words()]
        answer = no_answer or self.answer(target, result["answer"])
        panel = views.result(self.kicker, result, answer, self.tree.descriptions)
        return [panel, *self.figures(result), self.main_node(result), views.no_words()]

    def show_result_again(self, text: str, target: float) -> Any:
        """Return the outputs of a text for a changed target. Without a text, they stay as they are."""
        return self.show_result(text, target) if (text or "").strip() else gr.skip()

    def main_node(self, result: dict[str, Any]) -> str:
        """Return the label of the node that is explained by default."""
        return result["label"]

    def outcome(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the predictions of a result, as they are in a `Record`."""
        return {
            "predicted": result["label"],
            "probability": round(result["score"], 6),
            "path": [node["label"] for node in result["path"]],
        }

    def figures(self, result: dict[str, Any] | None = None) -> list[Any]:
        """Draw bars and icicle. Without a result, the bars are empty and all leaves of the icicle have the same size."""
        tree = self.tree
        parents = {tree.labels[n]: tree.labels[p] if (p := tree.parents[n]) >= 0 else "" for n in tree.reading_order}
        if result is not None:
            levels, path = result["levels"], [node["label"] for node in result["path"]]
            return [views.bars(levels, path), views.icicle(levels, parents, path)]
        even: list[dict[str, float]] = [{} for _ in range(tree.depth)]
        for node in tree.reading_order:
            even[tree.levels[node] - 1][tree.labels[node]] = len(tree.leaves_at_or_below[node]) / tree.num_leaves
        empty = [dict.fromkeys(level, 0.0) for level in even]
        return [views.bars(empty, []), views.icicle(even, parents, [])]

    def show_words(self, text: str, node: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        """Return the text with the weights of its words for a node."""
        try:
            text, node = check_text(text or ""), self.check_node(node)
        except Refused as error:
            return views.refusal(str(error), "Not explained")
        progress(0, desc="Explaining")
        report = () if spaces else (lambda share: progress(share, desc="Explaining"),)
        explanation = self._explain(text, node, *report)
        return views.words(text, explanation, self.classifier.model.config.is_multi_label)

    def close_file(self, run: Run | None) -> list[Any]:
        """End the run of the previous file, and clear the page for the next file. Return the outputs of `open_file`."""
        if run:
            run.end()
        return self.open_file(None)

    def open_file(self, path: str | None) -> list[Any]:
        """Read an upload into memory. Return its kind and content, its columns, a status line, and cleared outputs of a run."""
        cleared = [self.preview([]), views.problems([]), *no_downloads(), views.note("")]
        if path is None:
            return [None, gr.Dropdown(choices=[], value=None), views.progress(0, 0, 0, "No file yet."), *cleared]
        try:
            content, kind = take_upload(path), kind_of(path)
            table = read_table(content, kind)
        except Refused as error:
            return [None, gr.Dropdown(choices=[], value=None), views.refusal(str(error), "Not read"), *cleared]
        problems = sum(row.problem is not None for row in table.rows)
        progress = views.progress(0, len(table.rows), problems, "Read, and deleted from the disk. Classified:")
        return [(kind, content), gr.Dropdown(choices=table.columns, value=table.column), progress, *cleared]

    def begin_file(self, run: Run | None) -> list[Any]:
        """End the previous run and create a new one. Return the new run, and an empty note."""
        if run:
            run.end()
        return [Run(), views.note("")]

    def cancel_file(self, run: Run | None) -> str:
        return views.note("Cancelled. No results are kept." if run and run.end() else "Nothing is running.")

    def run_file(
        self, kept: tuple[str, bytes] | None, column: str, target: float, run: Run | None
    ) -> Iterator[list[Any]]:
        """Classify a file. Yield progress, preview, problems and two downloads, until the run is done or cancelled."""
        # ── Read: the run may be over, and the file refused ──
        nothing = [gr.skip()] * 5
        if run is None or not run.active:  # cancelled in the queue
            yield nothing
            return
        try:
            if kept is None:
                raise Refused(f"There is no file: choose one. It is kept for {KEPT_SECONDS // 60} minutes.")
            kind, content = kept
            target = check_target(self.classifier, target if is_calibrated(self.classifier) else None)
            table = read_table(content, kind, column or "")
        except Refused as error:
            yield [views.refusal(str(error)), gr.skip(), gr.skip(), *no_downloads()] if run.end() else nothing
            return
        if not run.active:  # cancelled while the file was read: the page may show another file by now
            yield nothing
            return

        # ── Classify: some rows at a time; gradio sends only what has changed ──
        done: list[dict[str, Any]] = []
        bad: list[Problem] = []
        total = len(table.rows)
        yield [views.progress(0, total, 0, "Classified"), self.preview([]), views.problems([]), *no_downloads()]
        sent = float("-inf")
        for records, problems in self._classify_rows(table.rows, target):
            if not run.active:
                break
            done += records
            bad += problems
            if time.monotonic() - sent < PROGRESS_SECONDS and len(done) + len(bad) < total:
                continue
            yield [
                views.progress(len(done) + len(bad), total, len(bad), "Classified"),
                self.preview(done[:PREVIEW]),
                views.problems(bad),
                gr.skip(),
                gr.skip(),
            ]
            sent = time.monotonic()

        # ── Write: two files to download ──
        if not run.end():
            yield nothing
            return
        with tempfile.TemporaryDirectory() as folder:  # gradio serves copies
            files = Path(folder, "predictions.csv"), Path(folder, "predictions.jsonl")
            # without a byte order mark, spreadsheets may read a CSV file in a local encoding
            files[0].write_text(self.to_csv(done), encoding="utf-8-sig", newline="")
            files[1].write_text(to_json_lines(done), encoding="utf-8", newline="")
            downloads = [gr.DownloadButton(value=str(file), interactive=True) for file in files]
            yield [views.progress(total, total, len(bad), "Done:"), gr.skip(), gr.skip(), *downloads]


class MultiLabelService(Service):
    """The functions for a multi-label model."""

    kicker = "Predicted labels"
    target_label = "Recall: the share of a text's correct nodes that the answer contains on average"
    target_info = "A higher recall needs more nodes in the answer."
    plots = (("tree", "The taxonomy: probability of each node. ✓: predicted", "The taxonomy"),)
    answer, preview = staticmethod(views.recall_answer), staticmethod(views.labels_preview)
    to_csv = staticmethod(lambda records: to_csv([join_lists(record) for record in records]))

    def classify(self, text: str, recall: float | None = None) -> MultiLabelClassification:
        """Classify a text into the taxonomy.

        Args:
            text: at most 20,000 characters.
            recall: between 0.5 and 0.99; the answer then contains this share of a text's correct nodes on average.

        Returns:
            - the deepest predicted nodes with their probabilities and paths, possibly none;
            - the answer for the recall;
            - the probability of every node, level by level;
            - the number of characters that were read.
        """
        return self._classify(text, recall)

    def classify_file(
        self, file: gr.FileData, column: str | None = None, recall: float | None = None
    ) -> MultiLabelFileResult:
        return super().classify_file(file, column, recall)

    classify_file.__doc__ = str(Service.classify_file.__doc__).replace("coverage", "recall")

    def main_node(self, result: dict[str, Any]) -> str:
        roots = result["levels"][0]
        return result["labels"][0]["label"] if result["labels"] else max(roots, key=roots.get)

    def outcome(self, result: dict[str, Any]) -> dict[str, Any]:
        return {
            "labels": [node["label"] for node in result["labels"]],
            "scores": [round(node["score"], 6) for node in result["labels"]],
        }

    def figures(self, result: dict[str, Any] | None = None) -> list[Any]:
        """Draw the tree. Without a result, its bars are empty."""
        tree = self.tree
        nodes = [(tree.labels[n], tree.levels[n]) for n in tree.reading_order]
        if result is None:
            return [views.tree(nodes, None, set())]
        scores = {label: score for level in result["levels"] for label, score in level.items()}
        return [views.tree(nodes, scores, {step["label"] for node in result["labels"] for step in node["path"]})]


def endpoint(method: Callable) -> Callable:
    """Wrap an API method: a refusal reaches the client as a message, and gradio hides all other errors."""

    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


def about(classifier: Pipeline, model: str, revision: str | None) -> tuple[str, str, str]:
    """Return the facts of a model as a table, and its card as Markdown in two parts."""
    config, tree = classifier.model.config, classifier.tree
    model_name = Path(model).resolve().name if Path(model).is_dir() else model
    path = cached_file(model, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False)
    card = Path(path).read_text(encoding="utf-8") if path else ""
    encoder = config.encoder_name_or_path
    if not is_calibrated(classifier):
        guaranteed = "no: trained without validation rows"
    elif config.refitted:
        guaranteed = "no: trained on the validation rows too"
    else:
        guaranteed = f"up to {highest_target(classifier):.0%}"
    facts = {
        "Model": model_name if revision is None else f"{model_name} at {revision[:12]}",
        "Encoder": Path(encoder).name if os.path.isabs(encoder) else encoder,
        "Taxonomy": f"{tree.num_leaves:,} classes, {tree.num_nodes:,} nodes, {tree.depth} levels",
        **({"Labels": "any number of nodes per text, possibly none"} if config.is_multi_label else {}),
        "Text length": f"at most {classifier.tokenizer.model_max_length:,} tokens",
        "Licence": views.licence(card),
        f"{guarantee(classifier).capitalize()} guarantee": guaranteed,
    }
    first, more = views.card_parts(card)
    return views.facts(facts), first or "The checkpoint has no model card.", more


def no_downloads() -> list[gr.DownloadButton]:
    return [gr.DownloadButton(interactive=False), gr.DownloadButton(interactive=False)]


def target_slider(service: Service, prefix: str = "") -> gr.Slider:
    highest = highest_target(service.classifier)
    calibrated = is_calibrated(service.classifier)
    info = service.target_info if calibrated else "Not available: this model was trained without validation rows."
    if service.classifier.model.config.refitted:
        info += f" The {guarantee(service.classifier)} is not guaranteed: the model was also trained on the validation rows."
    return gr.Slider(
        minimum=MIN_TARGET,
        maximum=MAX_TARGET,
        step=0.01,
        value=min(START_TARGET, highest) if calibrated else START_TARGET,
        interactive=calibrated,
        label=service.target_label,
        info=info,
        elem_id=prefix + guarantee(service.classifier),
    )


def plot(element: str, heading: str, label: str, figure: Any) -> gr.Plot:
    gr.HTML(f"<h2>{heading}</h2>", elem_classes="heading")
    return gr.Plot(figure, show_label=False, label=label, elem_id=element)


def text_tab(service: Service) -> None:
    """Lay out the tab for one text: its result, its figures, and the contributions of its words."""
    # ── Layout ───────────────────────────────────────────────────────────────────────────────────────────────────────
    tree = service.tree
    (captions, figure), *others = zip(service.plots, service.figures(), strict=True)
    with gr.Tab("One text", id="text"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                text = gr.Textbox(
                    label="Abstract",
                    info=f"At most {MAX_CHARACTERS:,} characters. Ctrl+Enter classifies.",
                    placeholder="Paste a medical abstract",
                    lines=11,
                    max_lines=11,
                    elem_id="abstract",
                )
                with gr.Row(elem_id="actions"):
                    run = gr.Button("Classify", variant="primary", elem_id="classify")
                    clear = gr.Button("Clear", elem_id="clear")
                labels = {"label": "Examples, made up for this page", "example_labels": [*EXAMPLES]}
                examples = gr.Examples(
                    [*EXAMPLES.values()], text, elem_id="examples", api_visibility="private", **labels
                )
                target = target_slider(service)
            with gr.Column(scale=6, min_width=300):
                result = gr.HTML(views.waiting(service.kicker), elem_id="result")
                plots = [plot(*captions, figure)]
        plots += [plot(*captions, figure) for captions, figure in others]
        with gr.Row(elem_id="ask"):
            node = gr.Dropdown(
                choices=[(" › ".join(tree.path_names(n)), tree.labels[n]) for n in tree.reading_order],
                value=tree.labels[tree.reading_order[0]],
                label="Node to explain",
                allow_custom_value=True,
                elem_id="node",
                scale=3,
            )
            show = gr.Button("Show the words", elem_id="show", scale=1)
        words = gr.HTML(views.no_words(), elem_id="words")

        # ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────
        results = [result, *plots, node, words]
        inputs = [text, target]
        texts = {"concurrency_id": "texts", **HIDDEN}
        gr.on([run.click, text.submit], service.show_result, inputs, results, **texts)
        target.change(service.show_result_again, inputs, results, trigger_mode="always_last", **texts)  # by keys, too
        examples.load_input_event.then(service.show_result, inputs, results, **texts)
        clear.click(
            lambda: ["", views.waiting(service.kicker), *service.figures(), gr.skip(), views.no_words()],
            None,
            [text, *results],
            queue=False,
            **HIDDEN,
        )
        gr.on(
            [show.click, node.input],
            service.show_words,
            [text, node],
            words,
            concurrency_id="words",
            show_progress="full",
            api_visibility="private",
        )


def file_tab(service: Service) -> None:
    """Lay out the tab for a file: its progress, its preview, its problems, and its downloads."""
    with gr.Tab("A file", id="file"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                file = gr.File(
                    label=f"CSV, TSV, JSON, Parquet or text; at most {MAX_BYTES // 2**20} MB, {MAX_ROWS:,} rows",
                    file_types=[f".{kind}" for kind in KINDS],
                    height=140,
                    elem_id="file",
                )
                column = gr.Dropdown(
                    choices=[], label="Column with the texts", allow_custom_value=True, elem_id="column"
                )
                file_target = target_slider(service, "file-")
                with gr.Row():
                    start = gr.Button("Classify the file", variant="primary", elem_id="start")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=6, min_width=300):
                progress = gr.HTML(views.progress(0, 0, 0, "No file yet."), elem_id="state")
                note = gr.HTML(views.note(""), elem_id="ended")
                with gr.Row():
                    as_csv = gr.DownloadButton("Download CSV", interactive=False, elem_id="csv")
                    as_lines = gr.DownloadButton("Download JSON Lines", interactive=False, elem_id="jsonl")
                gr.HTML(
                    "<p class='small'>The file is deleted as soon as it is read. Downloads are deleted "
                    f"after {KEPT_SECONDS // 60} minutes. Cells that a spreadsheet would run as a formula get an apostrophe in front.</p>"
                )
        kept = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.HTML(f"<h2>Preview: the first {PREVIEW} rows</h2>", elem_classes="heading")
        table = gr.HTML(service.preview([]), elem_id="preview")
        gr.HTML("<h2>Rows that could not be classified</h2>", elem_classes="heading")
        problems = gr.HTML(views.problems([]), elem_id="problems")

        # ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────
        running = gr.State(None)
        shown = [progress, table, problems, as_csv, as_lines]
        opened = [kept, column, *shown, note]
        closed = gr.on([file.upload, file.clear], service.close_file, running, opened, queue=False, **HIDDEN)
        closed.then(service.open_file, file, opened, concurrency_id="opening", **HIDDEN)
        start.click(service.begin_file, running, [running, note], queue=False, **HIDDEN).then(
            service.run_file,
            [kept, column, file_target, running],
            shown,
            concurrency_id="files",
            trigger_mode="multiple",  # the previous run may still be waiting, or finishing its last rows
            **HIDDEN,
        )
        # a separate output, because late progress messages would replace this note
        stop.click(service.cancel_file, running, note, queue=False, **HIDDEN)


def model_tab(classifier: Pipeline, model: str, revision: str | None) -> None:
    """Lay out the tab for the model: its facts and its card."""
    with gr.Tab("About the model", id="model"):
        facts, card, more = about(classifier, model, revision)
        gr.HTML(facts, elem_id="facts")
        gr.Markdown(card, elem_id="card", elem_classes="card")
        with gr.Accordion("Data, training and more of the model card", open=False):
            gr.Markdown(more, elem_classes="card")


def build(classifier: Pipeline, model: str, revision: str | None = None) -> gr.Blocks:
    """Build the page, with the API endpoints ``classify``, ``explain`` and ``classify_file``."""
    service = (MultiLabelService if classifier.model.config.is_multi_label else Service)(classifier)

    def forget(request: gr.Request) -> None:
        """Delete the state of a closed page. gradio would keep it for an hour, whatever its `time_to_live`."""
        page.state_holder.delete_state(request.session_hash)

    with gr.Blocks(title="Medical text, sorted into a taxonomy") as page:
        gr.HTML(views.masthead(), elem_id="masthead")
        with gr.Tabs():
            text_tab(service)
            file_tab(service)
            model_tab(classifier, model, revision)
        gr.HTML(views.footer(), elem_id="foot")

        for method, queue in (
            (service.classify, "texts"),
            (service.explain, "words"),
            (service.classify_file, "files"),
        ):
            result_type = method.__annotations__["return"]
            description = f"{inspect.getdoc(method)}\n\n{result_type.__name__}: {inspect.getdoc(result_type)}"
            gr.api(endpoint(method), api_name=method.__name__, api_description=description, concurrency_id=queue)
        page.unload(forget)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def theme() -> gr.themes.Base:
    """Return the theme: blue and slate, system fonts, nothing downloaded."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Base(
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_sm,
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="#005A96",
        button_primary_background_fill_hover="#00466F",
        button_primary_background_fill_dark="#0072B2",
        button_primary_background_fill_hover_dark="#005A96",
        slider_color="#0072B2",
    )


def log_without_values() -> None:
    """Log only the type and the place of errors, because their messages can contain what a user sent."""

    def print_exc(*_: Any, **__: Any) -> None:
        error = sys.exception()
        frames = traceback.extract_tb(error.__traceback__)[-4:] if error else []
        places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        print(f"{type(error).__name__} at {places}", file=sys.stderr, flush=True)

    def without_message(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is not None:
            record.msg, record.args = "a request failed: %s", (record.exc_info[0].__name__,)
            record.exc_info = record.exc_text = None
        return True

    traceback.print_exc = print_exc
    logging.getLogger("uvicorn.error").addFilter(without_message)


def delete_old_files() -> None:
    """Delete files before they are `KEPT_SECONDS` old, forever. gradio would keep the parts of broken uploads."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    while True:
        time.sleep(SWEEP_SECONDS)
        for path in sorted(folder.rglob("*"), reverse=True):  # files before their folder
            with suppress(OSError):  # a folder that is not empty, or a file that is deleted by now
                if time.time() - path.stat().st_mtime > KEPT_SECONDS - SWEEP_SECONDS:
                    path.rmdir() if path.is_dir() else path.unlink()


def launch(page: gr.Blocks) -> None:
    """Serve the page, without the optional features of gradio, such as history, monitoring and sharing."""
    harden_gradio()
    threading.Thread(target=delete_old_files, daemon=True).start()
    page.launch(
        theme=theme(),
        css_paths=Path(__file__).with_name("style.css"),
        head=views.HEAD,
        footer_links=["api", "settings"],
        max_file_size=MAX_BYTES,
        state_session_capacity=200,
        run_history=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        share=False,
        server_port=int(port) if (port := os.environ.get("GRADIO_SERVER_PORT")) else None,  # no other if it is taken
        app_kwargs={"middleware": [Middleware(Guard)]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a checkpoint as a page.", usage=argparse.SUPPRESS)
    parser.add_argument("--model", default=os.environ.get("MODEL_ID"), help="folder or Hub id; default: $MODEL_ID")
    parser.add_argument("--revision", help="commit; default: $MODEL_REVISION")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: give --model, or set the variable MODEL_ID")
    is_folder = Path(arguments.model).is_dir()
    if is_folder and arguments.revision:
        parser.error(f"--revision {arguments.revision} does not apply to the folder {arguments.model}")
    if not is_folder and arguments.model.startswith(("/", ".", "~")):
        parser.error(f"cannot load the model {arguments.model}: there is no such folder")
    log_without_values()
    revision = None if is_folder else arguments.revision or os.environ.get("MODEL_REVISION") or None
    for name in ("SIGTERM", "SIGHUP"):  # files are deleted at the end; nohup ignores SIGHUP
        if (number := getattr(signal, name, None)) and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda *_: sys.exit(0))
    try:
        classifier = load(arguments.model, revision)
    except Exception as error:  # loading runs the checkpoint's own code, which can raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problem = "it is not a checkpoint of this project" if "Unknown task" in lines[0] else " ".join(lines)
        if "See the original errors" in problem:  # with tracebacks; the last line is the cause
            problem = lines[-1].partition(": ")[2]
        parser.error(f"cannot load the model {arguments.model}: {problem}")
    try:
        launch(build(classifier, arguments.model, revision))
    except OSError as error:  # the port is taken
        parser.error(str(error))


if __name__ == "__main__":
    main()
