"""The configuration of a hierarchical text classifier. Nothing here uses torch.

Worth knowing:

1. The taxonomy is stored in ``config.json`` as nested lists. JSON written with sorted keys would reorder nested
   objects, and with them the class indices.
2. ``id2label`` and ``label2id`` are always derived from the taxonomy: its leaves, or for multi-label models all its
   nodes.
3. The encoder's configuration is called ``text_config``, because transformers looks for that name.
4. `ENCODER_FIELDS` are also written at the top level of ``config.json``, where text-embeddings-inference reads them. They
   are never read back.
5. ``config.json`` has a ``format_version``. A release that older code would misread raises `FORMAT_VERSION`.
"""

import inspect
from typing import Any

from transformers import AutoConfig, PretrainedConfig

try:
    from .taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, TaxonomyError, to_nfc
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, TaxonomyError, to_nfc

FORMAT_VERSION = 1  # of config.json. Version 1 is also read without the field
MULTI_LABEL = "multi_label_classification"
ENCODER_FIELDS = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id")
CALIBRATION = (  # fields that are fitted to trained weights, without those of the lexical head
    *("temperatures", "node_scales", "node_biases", "node_thresholds"),
    *("conformal_thresholds", "conformal_max_length", "recall_thresholds", "recall_texts", "refitted"),
)
DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
DEFAULT_ENCODER_REVISION = "d5892b39a4adaed74b92212a44081509db72f87b"


class HierarchicalConfig(PretrainedConfig):
    """Configuration of a `HierarchicalForSequenceClassification`.

    Args:
        text_config: the encoder's configuration, as an object or a dict with ``model_type``. BERT's by default.
        taxonomy: a `Taxonomy`, or its nested form; by default that of the Medical Abstracts corpus.
        label_separator: separator between the names of a path.
        descriptions: phrases that describe nodes, by label; not every node needs one.
        encoder_name_or_path, encoder_revision: Hub id and commit of the encoder's weights, or a folder and None.
        adapter_subfolder: subfolder of the checkpoint with a PEFT adapter; None in the self-contained form.
        pooling: ``"mean"`` over the tokens that are not padding; ``"cls"``, the first token; or ``"label_attention"``, a
            weighted mean for each node.
        head_dropout: dropout probability before the heads.
        initializer_range: standard deviation of new head weights.
        lexical_vocab_size, lexical_weight: the number of token ids of the lexical head, and the weight of its scores
            relative to the encoder's. None without a lexical head.
        temperatures: one divisor of the scores for each decision, by id; None means 1 for all.
        conformal_thresholds: for coverages of 0.01, 0.02, … 0.99, the threshold with which this share of answers
            contains the correct label; see `pipeline_hierarchical.conformal_answer`. An entry is None if texts were too few.
        conformal_max_length: the length in tokens, special ones included, at which texts were truncated when the
            thresholds were fitted; None if unknown.
        node_biases: added to each node's score, after the temperature or scale. None: 0.
        node_scales: factor of each node's score, for multi-label models. None: 1.
        node_thresholds: least probability at which each node is predicted, for multi-label models. None: 0.5.
        recall_thresholds: for multi-label models and recalls of 0.01, 0.02, … 0.99, the least probability of a node in the
            answer. An entry is None if texts were too few.
        recall_texts: number of labelled texts that ``recall_thresholds`` were fitted on.
        refitted: whether the weights were also trained on the rows that the thresholds were fitted on (``--refit``). If so,
            neither coverage nor recall is guaranteed.
        problem_type: ``"multi_label_classification"`` for multi-label models. By default a text has one path.

    Raises:
        TaxonomyError: the taxonomy is invalid, or ``id2label`` or ``num_labels`` does not fit it.
        ValueError: another field has an invalid type, length or value.
    """

    model_type = "hierarchical_text_classification"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["node_log_probs", "decision_logits", "hidden_states", "attentions"]

    def __init__(
        self,
        text_config: dict | PretrainedConfig | None = None,
        taxonomy: "Taxonomy | list | dict | None" = None,
        label_separator: str = "/",
        descriptions: dict[str, str] | None = None,
        encoder_name_or_path: str = DEFAULT_ENCODER,
        encoder_revision: str | None = None,
        adapter_subfolder: str | None = None,
        pooling: str = "mean",
        head_dropout: float = 0.0,
        initializer_range: float = 0.02,
        lexical_vocab_size: int | None = None,
        lexical_weight: float | None = None,
        temperatures: list[float] | None = None,
        conformal_thresholds: list[float | None] | None = None,
        conformal_max_length: int | None = None,
        node_scales: list[float] | None = None,
        node_biases: list[float] | None = None,
        node_thresholds: list[float] | None = None,
        recall_thresholds: list[float | None] | None = None,
        recall_texts: int | None = None,
        refitted: bool | None = None,
        problem_type: str | None = None,
        **kwargs,
    ):
        tree: Any = taxonomy
        if not isinstance(tree, Taxonomy):
            tree = Taxonomy(DEFAULT_TAXONOMY if tree is None else tree, label_separator, descriptions)
        if pooling not in ("mean", "cls", "label_attention"):
            raise ValueError(f"pooling must be 'mean', 'cls' or 'label_attention', not {pooling!r}")
        self.text_config = text_config if isinstance(text_config, PretrainedConfig) else encoder_config(text_config)
        if getattr(self.text_config, "attention_type", None) == "block_sparse":
            # block-sparse BigBird switches to full attention permanently at its first short text
            self.text_config.attention_type = "original_full"
        self.taxonomy = tree.to_nested()
        self.label_separator, self.descriptions = tree.separator, tree.descriptions or None
        self.encoder_name_or_path, self.encoder_revision = encoder_name_or_path, encoder_revision
        self.adapter_subfolder = adapter_subfolder
        self.pooling = pooling
        self.head_dropout, self.initializer_range = head_dropout, initializer_range
        if (lexical_vocab_size is None) != (lexical_weight is None):
            raise ValueError("lexical_vocab_size and lexical_weight must be given together")
        self.lexical_vocab_size, self.lexical_weight = lexical_vocab_size, lexical_weight
        self.temperatures = checked_numbers("temperatures", temperatures, len(tree.decisions))
        self.conformal_thresholds = checked_numbers("conformal_thresholds", conformal_thresholds, 99, or_none=True)
        self.conformal_max_length = conformal_max_length
        self.node_scales = checked_numbers("node_scales", node_scales, tree.num_nodes)
        self.node_biases = checked_numbers("node_biases", node_biases, tree.num_nodes)
        self.node_thresholds = checked_numbers("node_thresholds", node_thresholds, tree.num_nodes)
        self.recall_thresholds = checked_numbers("recall_thresholds", recall_thresholds, 99, or_none=True)
        self.recall_texts = recall_texts
        self.refitted = refitted
        if problem_type not in (None, "single_label_classification", MULTI_LABEL):
            expected = f"'single_label_classification' or {MULTI_LABEL!r}"
            raise ValueError(f"problem_type must be {expected}, not {problem_type!r}")

        classes = tree.labels if problem_type == MULTI_LABEL else tree.labels[: tree.num_leaves]
        given = kwargs.pop("id2label", None)
        given = {str(i): to_nfc(label) for i, label in given.items()} if isinstance(given, dict) else given
        if given not in (None, {str(i): label for i, label in enumerate(classes)}):
            raise TaxonomyError("id2label is not the list of the taxonomy's classes; change the taxonomy instead")
        if kwargs.pop("num_labels", len(classes)) != len(classes):
            raise TaxonomyError("num_labels is not the number of the taxonomy's classes; change the taxonomy instead")
        kwargs.pop("label2id", None)
        super().__init__(
            id2label=dict(enumerate(classes)),
            label2id={label: i for i, label in enumerate(classes)},
            problem_type=problem_type,
            **kwargs,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration, and check arguments given at loading as if they were stored.

        A given taxonomy that is not the stored one removes the calibration. ``replaced_taxonomy`` then keeps the stored one,
        to which the stored heads belong.

        Raises:
            ValueError: the configuration has a newer format, or see the class.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            problem = f"its format_version is {version!r}, and this code reads versions up to {FORMAT_VERSION}"
            advice = "use a newer release, or trust_remote_code=True, which runs the code that the checkpoint holds"
            raise ValueError(f"{problem}: {advice}")
        # ENCODER_FIELDS repeat text_config, and a stored attn_implementation can name a repository of unpinned code
        not_read = ["attn_implementation", "_attn_implementation", *ENCODER_FIELDS]
        not_read += ["format_version", "replaced_taxonomy"]  # not fields
        own = {*inspect.signature(cls.__init__).parameters, "id2label", "label2id", "num_labels"} - {"text_config"}
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in own}
        if given.get("taxonomy") is not None:
            stored, new = (read_tree(fields) for fields in (config_dict, {**config_dict, **given}))
            if stored != new:
                not_read += CALIBRATION
                given["replaced_taxonomy"] = stored
        config_dict = {name: value for name, value in config_dict.items() if name not in not_read}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def set_taxonomy(self, taxonomy: Taxonomy) -> None:
        """Replace the taxonomy, and with it the classes."""
        new = type(self)(taxonomy=taxonomy, problem_type=self.problem_type)
        for name in ("taxonomy", "label_separator", "id2label", "label2id"):
            setattr(self, name, getattr(new, name))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as stored, with the format's version and `ENCODER_FIELDS` of the encoder."""
        fields = {name: getattr(self.text_config, name, None) for name in ENCODER_FIELDS}
        fields |= {"format_version": FORMAT_VERSION}
        stored = super().to_dict() | {name: value for name, value in fields.items() if value is not None}
        stored.pop("replaced_taxonomy", None)
        return stored

    @property
    def tree(self) -> Taxonomy:
        """The taxonomy as an object, built from ``taxonomy`` at each access."""
        return Taxonomy(self.taxonomy, self.label_separator, self.descriptions)

    @property
    def is_multi_label(self) -> bool:
        return self.problem_type == MULTI_LABEL

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.text_config.hidden_size = value


def read_tree(fields: dict[str, Any]) -> Taxonomy:
    """Build the taxonomy of a configuration's fields, without descriptions."""
    tree = fields.get("taxonomy")
    if isinstance(tree, Taxonomy):
        return tree
    return Taxonomy(DEFAULT_TAXONOMY if tree is None else tree, fields.get("label_separator", "/"))


def encoder_config(given: dict | None) -> PretrainedConfig:
    """Build an encoder's configuration from its fields, or raise ValueError. The default ``model_type`` is bert."""
    try:
        return AutoConfig.for_model(**{"model_type": "bert", **(given or {})})
    except Exception as error:  # each configuration checks its values in its own way
        raise ValueError(f"text_config is not the configuration of an encoder: {error}") from error


def checked_numbers(name: str, values: list | None, count: int, or_none: bool = False) -> list | None:
    """Check that a field is None, or a list of ``count`` numbers. With ``or_none``, an entry may be None."""
    given = list(values) if isinstance(values, (list, tuple)) else []
    numbers = (int, float, type(None)) if or_none else (int, float)
    are_numbers = all(isinstance(value, numbers) and not isinstance(value, bool) for value in given)
    if values is not None and (len(given) != count or not are_numbers):
        raise ValueError(f"{name} must be a list of {count} numbers")
    return None if values is None else given
