"""The configuration of a hierarchical text classifier. Nothing here uses torch.

Worth knowing:

1. The taxonomy is stored in ``config.json`` as nested lists. JSON written with sorted keys would
   reorder nested objects, and with them the class indices.
2. ``id2label`` and ``label2id`` are always derived from the taxonomy: its leaves, or for
   multi-label models all its nodes.
3. The encoder's configuration is called ``text_config``, because transformers looks for that name.
4. All that is fitted to trained weights is one field, `Calibration`.
5. `ENCODER_FIELDS` are also written at the top level of ``config.json``, where
   text-embeddings-inference reads them. They are never read back.
6. ``config.json`` has a ``format_version``. A release that older code would misread raises
   `FORMAT_VERSION`.
"""

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

try:
    from .taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, TaxonomyError, to_nfc
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, TaxonomyError, to_nfc

FORMAT_VERSION = 3  # of config.json
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
ENCODER_FIELDS = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id")
# ENCODER_FIELDS repeat text_config, and a stored attn_implementation can name a repository of
# unpinned code
NOT_READ = (*ENCODER_FIELDS, "attn_implementation", "_attn_implementation", "format_version")
# fields that are stored if they are given
IF_GIVEN = (
    "window",
    "tokens_before",
    "tokens_after",
    "page",
    "open_world",
    "lexical_entries",
    "self_test",
)
LISTS = (list, tuple)
# what ``self_test`` holds, see `checkpoint_hierarchical.record_self_test`
SELF_TEST_FIELDS = {"input_ids", "log_probs", "dtype", "torch", "transformers"}
PAGE = {"title": str, "medical": bool, "examples": list}  # what ``page`` may hold
DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
DEFAULT_ENCODER_REVISION = "d5892b39a4adaed74b92212a44081509db72f87b"


@dataclass
class Calibration:
    """What is fitted to trained weights, on the validation rows. None stands for the default.

    A decision score is  scales · (S(own) + lexical_weight · S(lexical)) + biases, with S of
    `Decisions.inclusive`.

    Attributes:
        lexical_weight: weight of the lexical head's scores, relative to the encoder's. None without
            a lexical head.
        scales, biases: of each node's score, (num_nodes,). By default 1 and 0.
        thresholds: least probability at which each node is predicted, (num_nodes,), for multi-label
            models. By default 0.5.
        set_thresholds: thresholds of prediction sets for coverages, or recalls, of 0.01, 0.02, …
            0.99. An entry is one threshold for all texts, or a list of one for each band, or None
            if texts were too few.
        set_bands: the probabilities of a text's most probable leaf that separate the bands, if
            there are any.
        set_scores, set_labels: of each text in the fit, the least common threshold whose set holds
            its labels, and the ids of these labels, for single-path models.
        prior: the mean probability of each class over the validation rows, (num_classes,).
        max_length: the length in tokens, special ones included, at which texts were truncated in
            the fit.
        num_texts: number of labelled texts that ``set_thresholds`` were fitted on.
        heads: what `checkpoint_hierarchical.project` says of the heads that this was fitted to.
    """

    lexical_weight: float | None = None
    scales: list[float] | None = None
    biases: list[float] | None = None
    thresholds: list[float] | None = None
    set_thresholds: list[float | list[float] | None] | None = None
    set_bands: list[float] | None = None
    set_scores: list[float] | None = None
    set_labels: list[list[int]] | None = None
    prior: list[float] | None = None
    max_length: int | None = None
    num_texts: int | None = None
    heads: list[float] | None = None

    def check(self, num_nodes: int, num_classes: int) -> None:
        """Raise ValueError unless each list has its length and holds numbers."""
        for name in ("scales", "biases", "thresholds"):
            check_numbers(name, getattr(self, name), num_nodes)
        check_numbers("prior", self.prior, num_classes)
        check_numbers("heads", self.heads, 2)
        check_numbers("set_bands", self.set_bands)
        thresholds = self.set_thresholds
        if isinstance(thresholds, LISTS):
            for entry in thresholds:
                if isinstance(entry, LISTS):
                    check_numbers(
                        "an entry of set_thresholds", entry, len(self.set_bands or ()) + 1
                    )
            thresholds = [
                0.0 if entry is None or isinstance(entry, LISTS) else entry for entry in thresholds
            ]
        check_numbers("set_thresholds", thresholds, 99)
        for labels in self.set_labels or ():
            is_list = isinstance(labels, LISTS) and len(labels) > 0
            if not is_list or not all(
                type(node) is int and 0 <= node < num_nodes for node in labels
            ):
                raise ValueError(
                    f"calibration: set_labels must hold lists of node ids, not {labels!r:.50}"
                )
        check_numbers("set_scores", self.set_scores, len(self.set_labels or ()))

    def of_nodes(self, tree: Taxonomy, old: Taxonomy, known: dict[int, int]) -> "Calibration":
        """Return the calibration for another taxonomy, where ``known`` are the ids in the ``old``
        one of the nodes that it had.

        A node that was not below its parent before gets the mean of its siblings that were. Nothing
        else is kept: what is fitted to sets and frequencies of nodes holds for these nodes alone.
        """
        parents = {-1: -1, **known}
        kept = {
            node: i
            for node, i in known.items()
            if parents.get(tree.parents[node]) == old.parents[i]
        }

        def of_nodes(values: list[float] | None, default: float) -> list[float] | None:
            if values is None:
                return None
            moved = [default] * tree.num_nodes
            for nodes in tree.decisions:
                siblings = [values[kept[node]] for node in nodes if node in kept]
                mean = sum(siblings) / len(siblings) if siblings else default
                for node in nodes:
                    moved[node] = values[kept[node]] if node in kept else mean
            return moved

        scales = of_nodes(self.scales, 1.0)
        biases = of_nodes(self.biases, 0.0)
        thresholds = of_nodes(self.thresholds, 0.5)
        return Calibration(
            self.lexical_weight, scales, biases, thresholds, max_length=self.max_length
        )

    def stored(self) -> dict[str, Any] | None:
        """Return the fields that are not None, or None if there are none."""
        return {name: value for name, value in asdict(self).items() if value is not None} or None


class HierarchicalConfig(PretrainedConfig):
    """Configuration of a `HierarchicalForSequenceClassification`.

    Args:
        text_config: the encoder's configuration, as an object or a dict with ``model_type``. BERT's
            by default.
        taxonomy: a `Taxonomy`, or its nested form; by default that of the Medical Abstracts corpus.
        label_separator: separator between the names of a path.
        descriptions: phrases that describe nodes, by label; not every node needs one.
        encoder_name_or_path, encoder_revision: Hub id and commit of the encoder's weights, or a
            folder and None.
        adapter_subfolder: subfolder of the checkpoint with a PEFT adapter; None in the
            self-contained form.
        pooling: ``"mean"`` over the tokens that are not padding; ``"cls"``, the first token;
            ``"label_attention"``, a weighted mean for each node; or ``"family_attention"``, one for
            the leaves below each inner node.
        head_dropout: dropout probability before the heads.
        initializer_range: standard deviation of new head weights.
        lexical_vocab_size: the number of token ids of the lexical head. None without one.
        lexical_entries: the number of its weights. None without one.
        window: the longest input of the encoder, in tokens; a longer text is read in several
            windows. By default the encoder's number of positions.
        tokens_before, tokens_after: ids of the special tokens that the tokenizer puts before and
            after a text. Without them, a text of several windows cannot be read.
        page: what card and Space show: ``title``, ``medical``, which is whether to say that the
            model is no medical device, and ``examples``, a list of texts. Each may be missing.
        calibration: a `Calibration`, or a dict of its fields.
        open_world: the number of references of the model's `OpenWorld`. None without one.
        self_test: the token ids of a short text, this model's log-probabilities of all nodes for
            it, and the dtype and versions that computed them: see `check_self_test`.
        problem_type: ``"multi_label_classification"`` for multi-label models. By default a text has
            one path.

    Raises:
        TaxonomyError: the taxonomy is invalid, or ``id2label`` or ``num_labels`` does not fit it.
        ValueError: another field has an invalid type, length or value.
    """

    model_type = "hierarchical_text_classification"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "node_log_probs",
        "decision_logits",
        "vectors",
        "hidden_states",
        "attentions",
    ]

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
        lexical_entries: int | None = None,
        window: int | None = None,
        tokens_before: list[int] | None = None,
        tokens_after: list[int] | None = None,
        page: dict[str, Any] | None = None,
        calibration: Calibration | dict | None = None,
        open_world: int | None = None,
        self_test: dict[str, Any] | None = None,
        problem_type: str | None = None,
        **kwargs,
    ):
        tree = read_tree(taxonomy, label_separator, descriptions)
        if pooling not in (poolings := ("mean", "cls", "label_attention", "family_attention")):
            raise ValueError(f"pooling must be one of {', '.join(poolings)}, not {pooling!r}")
        self.text_config = (
            text_config
            if isinstance(text_config, PretrainedConfig)
            else encoder_config(text_config)
        )
        if getattr(self.text_config, "attention_type", None) == "block_sparse":
            # block-sparse BigBird switches to full attention permanently at its first short text
            self.text_config.attention_type = "original_full"
        self.encoder_name_or_path = encoder_name_or_path
        self.encoder_revision = encoder_revision
        self.adapter_subfolder = adapter_subfolder
        self.pooling = pooling
        self.head_dropout = head_dropout
        self.initializer_range = initializer_range
        self.calibration = read_calibration(calibration)
        if open_world is not None and (type(open_world) is not int or open_world < 0):
            raise ValueError(f"open_world must be a number of references, not {open_world!r}")
        self.lexical_vocab_size = lexical_vocab_size
        self.lexical_entries = lexical_entries
        self.open_world = open_world
        self.window = window
        self.tokens_before = tokens_before
        self.tokens_after = tokens_after
        self.page = page or {}
        for name, value in self.page.items():
            if not isinstance(value, PAGE.get(name, ())):
                raise ValueError(
                    "page holds title (text), medical (true or false) and examples (a "
                    f"list), not {name}: {value!r}"
                )
        problem_type = problem_type or SINGLE_LABEL
        if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
            raise ValueError(
                f"problem_type must be {SINGLE_LABEL!r} or {MULTI_LABEL!r}, not {problem_type!r}"
            )

        self.self_test = self_test
        if self_test is not None:
            is_complete = isinstance(self_test, dict) and self_test.keys() == SELF_TEST_FIELDS
            if not is_complete or len(self_test["log_probs"]) != tree.num_nodes:
                fields = ", ".join(sorted(SELF_TEST_FIELDS))
                raise ValueError(
                    f"self_test must hold {fields}, with log_probs of {tree.num_nodes} nodes"
                )

        given = kwargs.pop("id2label", None)
        number = kwargs.pop("num_labels", None)
        kwargs.pop("label2id", None)
        super().__init__(problem_type=problem_type, **kwargs)
        self.set_taxonomy(tree)
        self.calibration.check(tree.num_nodes, len(self.id2label))
        of_lexical_head = (lexical_vocab_size, lexical_entries, self.calibration.lexical_weight)
        if None in of_lexical_head and any(value is not None for value in of_lexical_head):
            together = "lexical_vocab_size, lexical_entries and the calibration's lexical_weight"
            raise ValueError(f"{together} must be given together")
        given = (
            {int(i): to_nfc(label) for i, label in given.items()}
            if isinstance(given, dict)
            else given
        )
        if given not in (None, self.id2label) or number not in (None, len(self.id2label)):
            problem = (
                "id2label is not the list of the taxonomy's classes, or num_labels not their number"
            )
            raise TaxonomyError(f"{problem}; change the taxonomy instead")

    def set_taxonomy(self, tree: Taxonomy) -> None:
        """Set the taxonomy, and the fields that follow from it."""
        self.tree = tree
        self.taxonomy = tree.to_nested()
        self.label_separator = tree.separator
        self.descriptions = tree.descriptions or None
        classes = tree.labels if self.is_multi_label else tree.labels[: tree.num_leaves]
        self.id2label = dict(enumerate(classes))
        self.label2id = {label: i for i, label in enumerate(classes)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration, and check arguments given at loading as if they were stored.

        Raises:
            ValueError: the configuration has another format, a given taxonomy is not the stored
                one, or see the class.
        """
        version = config_dict.get("format_version")
        if version != FORMAT_VERSION:  # where a later release maps the fields of this format
            readable = f"this code reads version {FORMAT_VERSION}"
            problem = f"its format_version is {version!r}, and {readable}"
            advice = (
                "use another release, or trust_remote_code=True, which runs the code that the "
                "checkpoint holds"
            )
            raise ValueError(f"{problem}: {advice}")
        own = {
            *inspect.signature(cls.__init__).parameters,
            "id2label",
            "label2id",
            "num_labels",
        } - {"text_config"}
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in own}
        if given.get("taxonomy") is not None and read_tree(**{**config_dict, **given}) != read_tree(
            **config_dict
        ):
            problem = (
                "the stored heads belong to the stored taxonomy, which cannot be replaced at "
                "loading"
            )
            raise ValueError(f"{problem}: load the model, then call its add_nodes")
        config_dict = {name: value for name, value in config_dict.items() if name not in NOT_READ}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as stored, with the format's version and `ENCODER_FIELDS` of
        the encoder.
        """
        fields = {name: getattr(self.text_config, name, None) for name in ENCODER_FIELDS}
        positions = fields["max_position_embeddings"]
        # else engines truncate long texts
        if self.tokens_before is not None and positions is not None:
            fields["max_position_embeddings"] = max(positions, self.calibration.max_length or 0)
        stored = super().to_dict() | {
            name: value for name, value in fields.items() if value is not None
        }
        for name in ("tree", *(name for name in IF_GIVEN if stored.get(name) in (None, {}))):
            stored.pop(name, None)  # a configuration is shown in errors before it is complete
        return stored | {"calibration": self.calibration.stored(), "format_version": FORMAT_VERSION}

    @property
    def is_multi_label(self) -> bool:
        return self.problem_type == MULTI_LABEL

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.text_config.hidden_size = value


def read_tree(
    taxonomy: "Taxonomy | list | dict | None" = None,
    label_separator: str = "/",
    descriptions: dict[str, str] | None = None,
    **fields: Any,
) -> Taxonomy:
    """Build the taxonomy from the fields of a configuration. Other fields are ignored."""
    if isinstance(taxonomy, Taxonomy):
        return taxonomy
    return Taxonomy(
        DEFAULT_TAXONOMY if taxonomy is None else taxonomy, label_separator, descriptions
    )


def encoder_config(given: dict | None) -> PretrainedConfig:
    """Build an encoder's configuration from its fields, or raise ValueError.

    The default ``model_type`` is bert.
    """
    try:
        return AutoConfig.for_model(**{"model_type": "bert", **(given or {})})
    except Exception as error:  # each configuration checks its values in its own way
        raise ValueError(f"text_config is not the configuration of an encoder: {error}") from error


def read_calibration(given: Calibration | dict | None) -> Calibration:
    """Build a calibration from its fields, or raise ValueError.

    Code that a checkpoint holds has its own class of this name.
    """
    try:
        return Calibration(**(asdict(given) if is_dataclass(given) else given or {}))
    except TypeError as error:
        raise ValueError(f"calibration has unknown fields: {error}") from error


def check_numbers(name: str, values: Any, count: int | None = None) -> None:
    """Raise ValueError unless a field of a calibration is None, or a list of ``count`` numbers,
    by default of any number.
    """
    if values is None:
        return
    is_list = isinstance(values, LISTS) and count in (None, len(values))
    if not is_list or not {*map(type, values)} <= {int, float}:
        numbers = "numbers" if count is None else f"{count} numbers"
        raise ValueError(f"calibration: {name} must be a list of {numbers}")
