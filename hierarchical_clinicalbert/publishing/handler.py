"""Serve a checkpoint on Hugging Face Inference Endpoints, whose toolkit imports this file and calls
`EndpointHandler`.

It is published as ``handler.py`` beside the checkpoint, and imports nothing else of this project.
The toolkit returns the message of any exception to the client, with status 400.
"""

from typing import Any

from transformers import pipeline

PARAMETERS = ("top_k", "coverage", "recall", "prior", "levels")


class EndpointHandler:
    """Classify the texts of a request.

    Args:
        path: the folder of the checkpoint.
    """

    def __init__(self, path: str = ""):
        self.classify = pipeline(
            "hierarchical-text-classification", model=path, trust_remote_code=True
        )

    def __call__(self, data: dict[str, Any]) -> dict | list:
        """Return the pipeline's result for a text under ``"inputs"``, or its results for a list of
        texts.

        ``"parameters"`` may hold ``top_k``, ``coverage``, ``recall``, ``prior`` and ``levels``, as
        arguments of the pipeline.

        Raises:
            ValueError: the request cannot be used. The message is one line and holds none of the
            texts.
        """
        if not isinstance(data, dict) or not isinstance(data.get("inputs"), (str, list)):
            raise ValueError(
                'a request is {"inputs": a text or a list of texts}, and optionally "parameters"'
            )
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict) or not {*PARAMETERS}.issuperset(parameters):
            raise ValueError(f'"parameters" must be an object with any of {", ".join(PARAMETERS)}')
        return self.classify(data["inputs"], **parameters)
