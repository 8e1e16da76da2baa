"""The Space: paste a medical abstract, see its path through the taxonomy.

    python space/app.py --model results/quickstart

On a hosted Space the model is named by the variables MODEL_ID and MODEL_REVISION, which push_to_hub.py sets. Nothing of
the repository is imported: the model and its pipeline come with the checkpoint, as for any stranger.
"""

import argparse
import os

import gradio as gr
from transformers import pipeline

MAX_CHARACTERS = 20_000
DISCLAIMER = "For research. Not a medical device, and not for diagnosis. Texts are neither logged nor kept."


def load(model: str, revision: str | None):
    """The pipeline of a checkpoint, from a folder or from the Hub."""
    return pipeline("hierarchical-text-classification", model=model, revision=revision, trust_remote_code=True)


def build(classifier) -> gr.Blocks:
    """The page, and its API endpoint ``classify``."""

    def classify(text: str) -> tuple[str, dict[str, float], str]:
        """Path from the root to the most probable leaf, the leaves' probabilities, and a note where text was cut off."""
        if len(text) > MAX_CHARACTERS:
            raise gr.Error(
                f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.", print_exception=False
            )
        if not text.strip():
            raise gr.Error("There is no text to classify.", print_exception=False)
        leaves = classifier(text, top_k=classifier.tree.num_leaves)
        best = leaves[0]
        path = " → ".join(f"{node['label']} ({node['score']:.0%})" for node in best["path"])
        note = "The text is longer than the model reads: its end was cut off." if best["truncated"] else ""
        return path, {leaf["label"]: leaf["score"] for leaf in leaves}, note

    with gr.Blocks(title="Hierarchical text classification", analytics_enabled=False) as page:
        gr.Markdown(f"# Medical text, sorted into a taxonomy\n\n{DISCLAIMER}")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Abstract", lines=12, max_lines=24, max_length=MAX_CHARACTERS)
                button = gr.Button("Classify", variant="primary")
            with gr.Column():
                path = gr.Textbox(label="Path through the taxonomy", interactive=False)
                leaves = gr.Label(label="Classes", num_top_classes=10)
                note = gr.Textbox(label="Note", interactive=False)
        button.click(classify, text, [path, leaves, note], api_name="classify")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a checkpoint as a page.")
    parser.add_argument("--model", default=os.environ.get("MODEL_ID"), help="folder or Hub id; MODEL_ID by default")
    parser.add_argument(
        "--revision", default=os.environ.get("MODEL_REVISION"), help="commit; MODEL_REVISION by default"
    )
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: give --model, or set the variable MODEL_ID")
    build(load(arguments.model, arguments.revision or None)).launch(show_error=True)


if __name__ == "__main__":
    main()
