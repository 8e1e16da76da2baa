"""Serve a checkpoint as a page and an API: the classes of a text, their probabilities, and the
contributions of its words.

    python space/app.py --model results/quickstart

Worth knowing:

1. On a hosted Space the variables MODEL_ID and MODEL_REVISION name the model; push_to_hub.py sets
   them. The Space imports only `hierarchical_clinicalbert.reading` of this repository. The model
   and its pipeline are loaded through transformers.
2. An upload is read into memory and deleted at once. Downloads, what is left of broken uploads, and
   results that nobody reads are deleted after `KEPT_SECONDS` (see `retention.py`), and when the
   page stops. Nothing that a user sends is logged: see `log_without_values` and `guard.py`.
3. Texts, explanations and files have separate queues, so a text never waits for a file.
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
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

# before gradio is imported: send no analytics, and keep none in memory, because each request would
# aggregate them again
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
# a private folder for uploads and downloads: the default folder may belong to another user
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="space-")

# gradio reads it
if not (port := os.environ.get("GRADIO_SERVER_PORT", "7860")).isdecimal() or int(port) > 65535:
    print(
        f"app.py: error: GRADIO_SERVER_PORT must be a number up to 65535, not {port}",
        file=sys.stderr,
    )
    sys.exit(2)

from service import SERVICES, Service  # first, because it imports `spaces`

# isort: split
import gradio as gr
import views
from classification import MAX_TARGET, MIN_TARGET, highest_target, load
from guard import Guard, harden_gradio
from retention import KEPT_SECONDS, sweeping
from starlette.middleware import Middleware
from tables import KINDS, MAX_BYTES, MAX_CHARACTERS, MAX_ROWS, Refused
from transformers import Pipeline
from transformers.utils import cached_file

atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

MAX_WAITING = 100  # requests; to more, gradio replies "Queue is full! Please try again."
START_TARGET = 0.9  # of the guarantee
SHOWN_WORDS = 4  # of an example on its button
MEDICAL_EXAMPLES = [  # where the publisher gives none; the second one has two subjects
    "Whether mesalamine keeps ulcerative colitis quiet after a first attack was asked in "
    "148 outpatients. All "
    "underwent colonoscopy with biopsy at entry and after one year. Mucosal inflammation "
    "returned in 31 % under treatment "
    "and in 58 % under placebo. Two patients were withdrawn for an unrelated cardiac "
    "arrhythmia. Maintenance treatment "
    "of the inflamed bowel is supported.",
    "Two studies are reported together. Migraine was treated with propranolol in 84 "
    "patients, and attacks were halved in 58 %. "
    "Hypertension was treated with propranolol in 91 patients, and blood pressure was "
    "normal after six months in 63 %. Fatigue "
    "led to withdrawal in both. Whether one dose suits both remains open.",
]
# for events: no spinner, no endpoint
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}


def endpoint(method: Callable) -> Callable:
    """Wrap an API method: a refusal reaches the client as a message, and gradio hides all other
    errors.
    """

    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


def target_slider(service: Service, prefix: str = "") -> gr.Slider:
    highest = highest_target(service.classifier)
    calibrated = highest >= MIN_TARGET
    return gr.Slider(
        minimum=MIN_TARGET,
        maximum=MAX_TARGET,
        step=0.01,
        value=min(START_TARGET, highest) if calibrated else START_TARGET,
        interactive=calibrated,
        label=service.target_label,
        info=service.target_info
        if calibrated
        else "Not available: this model was trained without validation rows.",
        elem_id=prefix + service.guarantee,
    )


def show_examples(service: Service, text: gr.Textbox) -> list[Any]:
    """Lay out the publisher's examples, or for a medical model those of this file.

    Return the event of a choice, if there are some.
    """
    examples = service.page.get("examples") or (MEDICAL_EXAMPLES if service.page["medical"] else [])
    if not examples:
        return []
    starts = [" ".join(example.split()[:SHOWN_WORDS])[:40] + " …" for example in examples]
    shown = gr.Examples(
        [[example] for example in examples],
        text,
        label="Examples",
        example_labels=starts,
        elem_id="examples",
        api_visibility="private",
    )
    return [shown.load_input_event]


def text_tab(service: Service) -> None:
    """Lay out the tab for one text: its result, the tree, and the contributions of its words."""
    # ── Layout ────────────────────────────────────────────────────────────────────────────────────
    with gr.Tab("One text", id="text"), gr.Row(equal_height=False, elem_id="one-text"):
        with gr.Column(scale=5, min_width=300):
            text = gr.Textbox(
                label="Text",
                info=f"At most {service.max_characters:,} characters. Shift+Enter classifies.",
                placeholder="Paste a medical abstract"
                if service.page["medical"]
                else "Paste a text",
                lines=9,
                max_lines=9,
                elem_id="abstract",
            )
            with gr.Row(elem_id="actions"):
                run = gr.Button("Classify", variant="primary", elem_id="classify")
                clear = gr.Button("Clear", elem_id="clear")
            chosen = show_examples(service, text)
            target = target_slider(service)
            words = gr.HTML(views.no_words(), elem_id="words")
        with gr.Column(scale=6, min_width=300):
            result = gr.HTML(views.waiting(), elem_id="result")
            tree = gr.HTML(views.tree(service.tree), elem_id="tree")
        # hidden by style.css; `views.HEAD` needs them in the page
        # the text that result, tree and words are of
        classified = gr.Textbox(elem_id="classified", label="classified")
        # the node to explain; a press on the tree sets it
        node = gr.Textbox(elem_id="node", label="node")

    # ── Events ────────────────────────────────────────────────────────────────────────────────────
    # each press is queued with its inputs, and each queue runs one event at a time, so the last
    # press counts
    results = [classified, result, tree, node]
    inputs = [text, target]
    texts = {"concurrency_id": "texts", "trigger_mode": "multiple", **HIDDEN}
    # inputs are passed unprocessed: gradio refuses a target that is typed halfway, such as the "0"
    # of "0.7", in a pop-up
    unprocessed = {**texts, "preprocess": False}
    explanations = {
        "concurrency_id": "words",
        "trigger_mode": "multiple",
        "api_visibility": "private",
    }
    explained = {
        "fn": service.show_words,
        "inputs": [classified, node],
        "outputs": words,
        "show_progress": "full",
    }
    shown = [gr.on([run.click, text.submit], service.show_result, inputs, results, **unprocessed)]
    shown += [event.then(service.show_result, inputs, results, **unprocessed) for event in chosen]
    for event in shown:
        event.then(**explained, **explanations)
    node.input(**explained, **explanations)
    by_keys = {**unprocessed, "trigger_mode": "always_last"}  # the slider may change with each key
    target.change(service.show_result_again, [classified, target], [result, tree], **by_keys)
    for box in (text, classified):
        box.change(None, [text, classified], None, js=views.MARK_OLD, api_visibility="private")

    cleared = clear.click(
        lambda: ["", *service.show_nothing(), views.no_words()],
        None,
        [text, *results, words],
        queue=False,
        **HIDDEN,
    )
    # again behind what is still computed, because gradio cannot cancel it: a late result, and then
    # its explanation
    cleared = cleared.then(service.show_nothing, None, results, **texts)
    cleared.then(views.no_words, None, words, show_progress="hidden", **explanations)


def file_tab(service: Service) -> None:
    """Lay out the tab for a file: its progress, its downloads, the summary, the rows, and its
    problems.
    """
    with gr.Tab("A file", id="file"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                file = gr.File(
                    label="A file of texts, or several .txt files",
                    file_count="multiple",
                    file_types=[f".{kind}" for kind in KINDS],
                    height=140,
                    elem_id="file",
                )
                column = gr.Dropdown(
                    choices=[],
                    label="Column with the texts",
                    allow_custom_value=True,
                    elem_id="column",
                )
                encodings = ["utf-8", "cp1252", "utf-16"]
                encoding = gr.Dropdown(
                    encodings, label="Encoding", allow_custom_value=True, elem_id="encoding"
                )
                file_target = target_slider(service, "file-")
                with gr.Row():
                    start = gr.Button("Classify the file", variant="primary", elem_id="start")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=6, min_width=300):
                progress = gr.HTML(views.progress(0, 0, 0, "No file yet."), elem_id="state")
                with gr.Row():
                    as_csv = gr.DownloadButton("Download CSV", interactive=False, elem_id="csv")
                    as_lines = gr.DownloadButton(
                        "Download JSON Lines", interactive=False, elem_id="jsonl"
                    )
                gr.HTML(
                    "<p class='note'>CSV, TSV, Excel, JSON, Parquet or text, with at most "
                    f"{MAX_BYTES // 2**20} MB and {MAX_ROWS:,} rows. The file is deleted as "
                    "soon as it is read, and downloads "
                    f"after {KEPT_SECONDS // 60} minutes. In CSV, a backslash stands "
                    "wherever a spreadsheet might begin a formula.</p>"
                )
        kept, rows = (gr.State(None, time_to_live=KEPT_SECONDS) for _ in range(2))
        page = gr.Textbox(elem_id="page", label="page")  # the page of the rows; its buttons set it
        gr.HTML("<h2>Summary</h2>", elem_classes="heading")
        summary = gr.HTML("", elem_id="summary")
        gr.HTML("<h2>Rows</h2>", elem_classes="heading")
        table = gr.HTML(views.table(service.tree, []), elem_id="rows")
        gr.HTML("<h2>Rows that could not be classified</h2>", elem_classes="heading")
        problems = gr.HTML(views.problems([]), elem_id="problems")

        # ── Events ────────────────────────────────────────────────────────────────────────────────
        shown = [progress, summary, table, problems, as_csv, as_lines, rows]
        opened = [kept, column, *shown]
        inputs = [kept, column, file_target, encoding]
        files = {"concurrency_id": "files", "preprocess": False, **HIDDEN}
        run = start.click(service.run_file, inputs, shown, **files)
        # also while the previous event is handled
        at_any_time = {"trigger_mode": "multiple", **HIDDEN}
        changed = [file.upload, file.clear]
        closed = gr.on(
            changed,
            lambda: service.open_file(None, None, None),
            None,
            opened,
            queue=False,
            cancels=run,
            **at_any_time,
        )
        opening = {"fn": service.open_file, "inputs": [file, kept, encoding], "outputs": opened}
        closed.then(**opening, concurrency_id="opening", **at_any_time)
        encoding.change(**opening, concurrency_id="opening", cancels=run, **at_any_time)
        stop.click(service.cancel_file, rows, shown, queue=False, cancels=run, **HIDDEN)
        page.input(service.turn_page, [rows, page], [table, page], queue=False, **at_any_time)


def model_tab(model: str, revision: str | None) -> None:
    """Lay out the tab for the model: how often it is correct, its plots, and where its card is."""

    def read(name: str) -> bytes | None:
        path = cached_file(
            model, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return Path(path).read_bytes() if path else None

    card = (read("README.md") or b"").decode()
    if Path(model).is_dir():
        where = "`README.md` in the model's folder"
    else:
        where = (
            f"[the model card](https://huggingface.co/{model}/blob/{revision or 'main'}/README.md)"
        )
    opening = f"{views.card_opening(card)}\n\nScores, limits, data and training: see {where}."
    with gr.Tab("About the model", id="model") as tab:
        gr.Markdown(opening if card else "The checkpoint has no model card.", elem_id="card")
        plots = gr.HTML("", elem_id="plots")
    # not before: they are large
    tab.select(lambda: views.card_plots(card, read), None, plots, queue=False, **HIDDEN)


def build(classifier: Pipeline, model: str, revision: str | None = None) -> gr.Blocks:
    """Build the page, with the API endpoints ``classify``, ``explain`` and ``classify_file``."""
    service = SERVICES[classifier.decisions.guarantee](classifier)

    # gradio would keep the state of a closed page for an hour
    def forget(request: gr.Request) -> None:
        page.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title=service.page["title"]) as page:
        gr.HTML(views.masthead(service.page["title"], service.page["medical"]), elem_id="masthead")
        with gr.Tabs():
            text_tab(service)
            file_tab(service)
            model_tab(model, revision)
        gr.HTML(views.footer(service.page["medical"]), elem_id="foot")

        queues = {
            service.classify: "texts",
            service.explain: "words",
            service.classify_file: "files",
        }
        for method, queue in queues.items():
            result = method.__annotations__["return"]
            description = f"{inspect.getdoc(method)}\n\n{result.__name__}: {inspect.getdoc(result)}"
            for words, own in (
                ("coverage", service.guarantee),
                (f"{MAX_CHARACTERS:,}", f"{service.max_characters:,}"),
            ):
                description = description.replace(words, own)
            gr.api(
                endpoint(method),
                api_name=method.__name__,
                api_description=description,
                concurrency_id=queue,
            )
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
        button_primary_background_fill_dark="#0072B2",
    )


def log_without_values() -> None:
    """Log only the type and the place of errors, because their messages can contain what a user
    sent.
    """

    def print_exc(*_: Any, **__: Any) -> None:
        error = sys.exception()
        frames = traceback.extract_tb(error.__traceback__)[-4:] if error else []
        places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        print(f"{type(error).__name__} at {places}", file=sys.stderr, flush=True)

    def without_message(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is not None:
            record.msg = "a request failed: %s"
            record.args = (record.exc_info[0].__name__,)
            record.exc_info = record.exc_text = None
        return True

    traceback.print_exc = print_exc
    logging.getLogger("uvicorn.error").addFilter(without_message)


def launch(page: gr.Blocks) -> None:
    """Serve the page, without the optional features of gradio, such as history, monitoring and
    sharing.
    """
    harden_gradio(page)
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
        # no other if it is taken
        server_port=int(port) if (port := os.environ.get("GRADIO_SERVER_PORT")) else None,
        app_kwargs={"middleware": [Middleware(Guard)], "lifespan": sweeping},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a checkpoint as a page.", usage=argparse.SUPPRESS
    )
    parser.add_argument(
        "--model", default=os.environ.get("MODEL_ID"), help="folder or Hub id; default: $MODEL_ID"
    )
    parser.add_argument("--revision", help="commit; default: $MODEL_REVISION")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: give --model, or set the variable MODEL_ID")
    is_folder = Path(arguments.model).is_dir()
    if is_folder and arguments.revision:
        parser.error(
            f"--revision {arguments.revision} does not apply to the folder {arguments.model}"
        )
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
        problem = (
            "it is not a checkpoint of this project"
            if "Unknown task" in lines[0]
            else " ".join(lines)
        )
        if "See the original errors" in problem:  # with tracebacks; the last line is the cause
            problem = lines[-1].partition(": ")[2]
        parser.error(f"cannot load the model {arguments.model}: {problem}")
    try:
        launch(build(classifier, arguments.model, revision))
    # the port is taken, or the version of gradio is not supported
    except (OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
