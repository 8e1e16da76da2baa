"""The taxonomy and the configuration of a hierarchical text classifier. Pure Python: nothing here uses torch.

Worth knowing:

1. A taxonomy is a forest of named nodes. Nodes are numbered leaves first, in reading order, then inner nodes, so that
   class index = leaf id = index into ``id2label``.
2. A node's label is its name, or its path (``parent/child``, and ``/root``) where two nodes share the name. Case is
   kept; letters with accents are composed (Unicode's NFC), so that a name is the same however it was typed.
3. The taxonomy is stored in ``config.json`` as nested lists: JSON written with sorted keys would reorder nested
   objects, and with them the class indices.
4. ``id2label`` and ``label2id`` are always derived from the taxonomy; they cannot disagree with it.
5. The encoder's configuration is called ``text_config`` because that is the name transformers looks for when it resizes
   embeddings or asks for the text part of a composite model.
"""

import csv
import difflib
import inspect
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEFAULT_TAXONOMY = [
    "general pathological conditions",
    {
        "specific disease": [
            "neoplasms",
            "digestive system diseases",
            "nervous system diseases",
            "cardiovascular diseases",
        ]
    },
]
DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
DEFAULT_ENCODER_REVISION = "d5892b39a4adaed74b92212a44081509db72f87b"
MAX_DEPTH = 16
MAX_NODES = 100_000
MAX_NAME = 500  # characters
SHOWN_CHARACTERS, SHOWN_WORDS, SHOWN_DIGITS = (
    60,
    5,
    4,
)  # what a message shows of a user's file at most, see `looks_like_name`
NEAR = 0.85  # similarity by difflib from which one name may be a misspelling of another
MOST_COMPARED = 1_000_000  # pairs of names, a few seconds
UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, line and paragraph separators


class TaxonomyError(ValueError):
    """A taxonomy that cannot be read, or a label that it does not hold. The message names the node."""


def looks_like_name(text: str) -> bool:
    """Whether a text can be the name of a class or a column, and is no text about a patient, date or identifier.

    A name has at most 60 characters and 5 words, ends no sentence, and more than 4 digits only where other characters are as many.
    """
    digits = sum(map(str.isdigit, text))
    return (
        len(text) <= SHOWN_CHARACTERS
        and len(text.split()) <= SHOWN_WORDS
        and digits <= max(SHOWN_DIGITS, len(text) // 2)
        and re.search(r"[.?!](\s|$)|[。！？]", text) is None
    )


def quote_name(value: object) -> str:
    """A name for a message, in quotes; of what does not look like a name, only how long it is."""
    if isinstance(value, tuple):
        return f"({', '.join(map(quote_name, value))})"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    text = str(value)
    return repr(value) if looks_like_name(text) else f"(a value of {len(text):,} characters)"


class WithoutAliases:
    """For a loader of PyYAML: refuses aliases, by which a few lines stand for any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        import yaml

        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            problem = "an alias (*name) is not supported: write out what the alias stands for"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[attr-defined]
        return super().compose_node(parent, index)  # type: ignore[misc]


def yaml_problem(error: Exception) -> str:
    """What PyYAML says of a file, without the lines that it quotes."""
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
    return said if mark is None else f"{said}, line {mark.line + 1}"


class Taxonomy:
    """A forest of named nodes, of any depth up to 16, with leaves at any depth.

    Args:
        tree: the forest, nested. A leaf is a string; an inner node is a one-item mapping of its name to its children.
            Mappings with several items, and empty or missing children (a leaf), are read too, so that
            ``{"a": {"b": None, "c": ["d", "e"]}}`` is a taxonomy as well.
        separator: what stands between the names of a path.

    Attributes:
        names, parents, levels, labels: one entry a node: its name, its parent's id (-1 for a root), its depth (roots
            are at 1), its label.
        reading_order: the ids of all nodes, each parent before its children, as a tree is drawn.
        num_leaves, num_nodes, depth: ids below ``num_leaves`` are leaves; ``depth`` is the deepest level.

    Raises:
        TaxonomyError: a name that is empty, longer than 500 characters or holds control characters, two siblings of one
            name, a path that is also a name, more than 16 levels or 100,000 nodes.
    """

    def __init__(self, tree: Sequence | dict, separator: str = "/"):
        if not isinstance(separator, str) or not separator:
            raise TaxonomyError(f"the label separator must be a non-empty text, not {separator!r}")
        if not isinstance(tree, (list, tuple, dict)):
            raise TaxonomyError(f"a taxonomy is a list or a mapping of names, not {type(tree).__name__}")
        self.separator = separator
        paths, has_children = self._flatten(tree)
        order = sorted(range(len(paths)), key=lambda i: has_children[i])  # stable: leaves first, in reading order
        self.num_nodes = len(order)
        self.num_leaves = self.num_nodes - sum(has_children)
        if self.num_leaves < 2:
            raise TaxonomyError(f"a taxonomy needs at least two leaves; this one has {self.num_leaves}")
        self._paths = [paths[i] for i in order]
        self.reading_order = sorted(range(self.num_nodes), key=order.__getitem__)
        self.names = [path[-1] for path in self._paths]
        self.levels = [len(path) for path in self._paths]
        self.depth = max(self.levels)
        id_of = {path: i for i, path in enumerate(self._paths)}
        self.parents = [id_of[path[:-1]] if len(path) > 1 else -1 for path in self._paths]

        by_name: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            by_name.setdefault(name, []).append(i)
        self._ambiguous = {name: ids for name, ids in by_name.items() if len(ids) > 1}
        self.labels = []
        self._ids: dict[str, int] = {}
        for i, path in enumerate(self._paths):
            written = separator.join(path)
            if path[-1] in self._ambiguous and len(path) == 1:
                written = separator + written  # a root's path would be its bare name
            self.labels.append(written if path[-1] in self._ambiguous else path[-1])
            for key in {written, self.labels[i]}:
                if self._ids.setdefault(key, i) != i:
                    raise TaxonomyError(
                        f"{quote_name(key)} is both the name of a node and the path to another; choose another label separator"
                    )

    @staticmethod
    def _flatten(tree: Sequence | dict) -> tuple[list[tuple[str, ...]], list[bool]]:
        """Every node's path in reading order, and whether it has children."""
        paths: list[tuple[str, ...]] = []
        has_children: list[bool] = []
        seen: set[tuple[str, ...]] = set()
        stack: list[tuple[tuple[str, ...], Sequence | dict]] = [((), tree)]
        while stack:
            parent, children = stack.pop()
            items = children.items() if isinstance(children, dict) else enumerate(children)
            found = []
            for key, value in items:
                if isinstance(children, dict):
                    found.append((key, value))
                elif isinstance(value, dict):
                    found.extend(value.items())
                else:
                    found.append((value, None))
            found = [(compose(name), below) for name, below in found]
            stack.extend(((*parent, name), below or ()) for name, below in reversed(found))
            if len(paths) + len(stack) > MAX_NODES:
                raise TaxonomyError(f"the taxonomy has more than {MAX_NODES:,} nodes")
            if parent:
                paths.append(parent)
                has_children.append(bool(found))
                if parent in seen:
                    where = f"under {quote_name(parent[-2])}" if len(parent) > 1 else "among the roots"
                    raise TaxonomyError(f"the name {quote_name(parent[-1])} occurs twice {where}")
                seen.add(parent)
            for name, below in found:
                place = " > ".join(map(quote_name, parent)) or "the top level"
                if not isinstance(name, str):
                    raise TaxonomyError(f"a name must be text, but {place} holds {quote_name(name)}; put it in quotes")
                if not name.strip():
                    raise TaxonomyError(f"an empty name at {place}")
                if len(name) > MAX_NAME:
                    raise TaxonomyError(
                        f"a name at {place} has {len(name):,} characters, at most {MAX_NAME} are supported"
                    )
                if name != name.strip() or any(unicodedata.category(c) in UNWRITABLE for c in name):
                    raise TaxonomyError(
                        f"the name {quote_name(name)} has white space around it or a control character in it"
                    )
                if below is not None and below != "" and not isinstance(below, (list, tuple, dict)):
                    raise TaxonomyError(
                        f"the children of {quote_name(name)} must be a list or a mapping, not {quote_name(below)}"
                    )
                if len(parent) == MAX_DEPTH:
                    raise TaxonomyError(
                        f"{quote_name(name)} is at level {MAX_DEPTH + 1}; at most {MAX_DEPTH} levels are supported"
                    )
        return paths, has_children

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str | None, str]], separator: str = "/") -> "Taxonomy":
        """From (parent, child) pairs of names. An empty parent, or one that is nobody's child, is a root.

        A root that is named only as a parent, and nearly as another node, may be a misspelling: a warning names both.

        Raises:
            TaxonomyError: a cycle, a child with two parents, an empty child.
        """
        parent_of: dict[str, str | None] = {}
        order: dict[str, list[str]] = {}
        for number, (parent, child) in enumerate(rows, start=1):
            parent, child = compose((parent or "").strip()) or None, compose((child or "").strip())
            if not child:
                raise TaxonomyError(f"row {number} of the taxonomy has an empty name (parent {quote_name(parent)})")
            if parent_of.get(child, parent) != parent:
                one, two = (quote_name(p) if p else "no parent" for p in (parent_of[child], parent))
                raise TaxonomyError(f"{quote_name(child)} has two parents: {one} and {two}")
            if child not in parent_of:
                parent_of[child] = parent
                if parent is not None:
                    order.setdefault(parent, []).append(child)
        roots = list(dict.fromkeys(parent or child for child, parent in parent_of.items()))
        roots = [name for name in roots if parent_of.get(name) is None]
        _warn_of_misspelt_roots([name for name in roots if name not in parent_of], {*parent_of, *roots}, order)

        reached: dict[str, dict[str, list]] = {name: {name: []} for name in roots}
        queue = list(roots)
        for name in queue:  # grows while it is walked
            for child in order.get(name, []):
                reached[child] = {child: []}
                reached[name][name].append(reached[child])
                queue.append(child)
        missed = next((name for name in parent_of if name not in reached), None)
        if missed is not None:
            chain = [missed]
            while (above := str(parent_of[chain[-1]])) not in chain:  # none of a cycle is without a parent
                chain.append(above)
            cycle = chain[chain.index(above) :]
            raise TaxonomyError(
                "the taxonomy has a cycle: " + " > ".join(map(quote_name, [*reversed(cycle), cycle[-1]]))
            )
        return cls([reached[name] for name in roots], separator)

    @classmethod
    def from_paths(cls, paths: Iterable[str | Sequence[str]], separator: str = "/") -> "Taxonomy":
        """From labels that are paths: ``"parent/child"`` texts, or sequences of names from the root down.

        Empty names at the end of a sequence mean that the path stops there.

        Raises:
            TaxonomyError: an empty name inside a path.
        """
        tree: dict = {}
        for path in paths:
            parts = [compose(part.strip()) for part in (path.split(separator) if isinstance(path, str) else path)]
            if not isinstance(path, str):
                while parts and not parts[-1]:
                    parts.pop()
            if not parts or not all(parts):
                raise TaxonomyError(
                    f"the label {quote_name(path if isinstance(path, str) else tuple(path))} has an empty name in its path"
                )
            here = tree
            for part in parts:
                here = here.setdefault(part, {})
        return cls(tree, separator)

    @classmethod
    def from_file(cls, path: str | Path, separator: str = "/") -> "Taxonomy":
        """From a file: nested ``.yaml``/``.yml``/``.json``, or ``.csv``/``.tsv`` rows with a ``parent`` column and a
        ``child`` (or ``name``, or ``node``) column.

        Raises:
            TaxonomyError: the file is missing, of another kind, or does not hold a taxonomy.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise TaxonomyError(f"cannot read the taxonomy {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TaxonomyError(f"the taxonomy {path} is not UTF-8 text: save it as UTF-8") from error
        try:
            if path.suffix in (".yaml", ".yml"):
                tree = _read_yaml(text)
            elif path.suffix == ".json":
                tree = json.loads(text, object_pairs_hook=_unique)
            elif path.suffix in (".csv", ".tsv"):
                return cls.from_rows(_read_rows(text, "," if path.suffix == ".csv" else "\t"), separator)
            else:
                raise TaxonomyError(f"expected .yaml, .yml, .json, .csv or .tsv, not {path.suffix or 'no suffix'!r}")
            if not isinstance(tree, (list, dict)) or not tree:
                raise TaxonomyError("expected a mapping or a list of names")
            return cls(tree, separator)
        except RecursionError as error:
            raise TaxonomyError(f"{path} is nested too deeply; at most {MAX_DEPTH} levels are supported") from error
        except ValueError as error:  # of ours, and JSON's
            raise TaxonomyError(f"{path}: {error}") from error

    def to_nested(self) -> list:
        """The forest as nested lists: a leaf is its name, an inner node ``{name: [children]}``."""
        built: list = [name if i < self.num_leaves else {name: []} for i, name in enumerate(self.names)]
        top: list = []
        for i in self.reading_order:  # parents come before children
            siblings = top if self.parents[i] < 0 else built[self.parents[i]][self.names[self.parents[i]]]
            siblings.append(built[i])
        return top

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for i in self.reading_order:
            children.setdefault(self.parents[i], []).append(i)
        return children

    def children(self, node: int) -> list[int]:
        """Ids of the children of a node, or of the roots for -1."""
        return self._children.get(node, [])

    def path(self, node: int) -> list[int]:
        """Ids from the root to the node, the node included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def path_names(self, node: int) -> tuple[str, ...]:
        """Names from the root to the node."""
        return self._paths[node]

    def id(self, label: str) -> int:
        """The id of the node with this label or path.

        Raises:
            TaxonomyError: no such node, or a name that several nodes share.
        """
        key = compose(label.strip()) if isinstance(label, str) else label
        if key in self._ids:
            return self._ids[key]
        if key in self._ambiguous:
            paths = " and ".join(quote_name(self.labels[i]) for i in self._ambiguous[key][:3])
            raise TaxonomyError(f"the label {quote_name(label)} is ambiguous: it names {paths}; write the path")
        near = difflib.get_close_matches(str(key), list(self._ids), n=1)
        few = ", ".join(map(quote_name, self.labels[:5]))
        hint = f"did you mean {quote_name(near[0])}?" if near else f"it has {few}, …"
        raise TaxonomyError(f"the label {quote_name(label)} is not in the taxonomy; {hint}")

    def tree(self) -> str:
        """The forest drawn as text, one node a line."""
        lines: list[str] = []

        def draw(node: int, prefix: str) -> None:
            below = self.children(node)
            for child in below:
                last = child == below[-1]
                mark = "" if node < 0 else ("└── " if last else "├── ")
                lines.append(prefix + mark + self.names[child])
                draw(child, prefix if node < 0 else prefix + ("    " if last else "│   "))

        draw(-1, "")
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Taxonomy) and (self._paths, self.separator) == (other._paths, other.separator)

    def __hash__(self) -> int:
        return hash((tuple(self._paths), self.separator))

    def __repr__(self) -> str:
        return f"Taxonomy({self.num_leaves} leaves, {self.num_nodes} nodes, {self.depth} levels)"


def compose(name: Any) -> Any:
    """A name with its letters and accents composed (NFC); what is no text as it is."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _warn_of_misspelt_roots(parents: list[str], names: set[str], children: dict[str, list[str]]) -> None:
    """Warns of roots that only (parent, child) rows name, as parents, and whose name is nearly another's.

    Large taxonomies, where this would take long, are not looked at.
    """
    if len(parents) * len(names) > MOST_COMPARED:
        return
    for name in parents:
        others = names - {name, *children[name]}
        if near := difflib.get_close_matches(name, sorted(others), n=1, cutoff=NEAR):
            logger.warning(
                f"the taxonomy's rows name {name!r} as a parent only, so it is a root: is it {near[0]!r}, misspelt?"
            )


def _unique(pairs: list[tuple[str, object]]) -> dict:
    unique: dict = {}
    for key, value in pairs:
        if not isinstance(key, str):  # YAML has lists and mappings as keys
            raise TaxonomyError(f"a name must be text, not {quote_name(key)}")
        if key in unique:
            raise TaxonomyError(f"the name {quote_name(key)} occurs twice in one mapping")
        unique[key] = value
    return unique


def _read_yaml(text: str) -> object:
    import yaml

    class Loader(WithoutAliases, yaml.BaseLoader):  # every scalar stays text: a class called `no` or `1` keeps its name
        def construct_mapping(self, node, deep=False):
            return _unique([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise TaxonomyError(yaml_problem(error)) from error


def _read_rows(text: str, delimiter: str) -> list[tuple[str, str]]:
    try:
        header, *rows = [fields for fields in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if fields]
    except (csv.Error, ValueError) as error:
        raise TaxonomyError(str(error) if text.strip() else "the file is empty") from error
    child = next((name for name in ("child", "name", "node") if name in header), None)
    if child is None or "parent" not in header:
        found = ", ".join(map(quote_name, header))
        raise TaxonomyError(f"expected columns 'parent' and 'child' (or 'name', 'node'), found {found}")
    if header.count("parent") > 1 or header.count(child) > 1:
        raise TaxonomyError(f"two columns of the taxonomy are called 'parent', or {child!r}")
    for number, fields in enumerate(rows, start=1):
        if len(fields) != len(header):
            raise TaxonomyError(
                f"row {number} of the taxonomy has {len(fields)} fields, where the header has {len(header)}"
            )
    return [(fields[header.index("parent")], fields[header.index(child)]) for fields in rows]


class HierarchicalConfig(PretrainedConfig):
    """Configuration of a `HierarchicalForSequenceClassification`.

    Args:
        text_config: the encoder's configuration, as an object or a dict with ``model_type``. BERT's by default.
        taxonomy: a `Taxonomy`, or its nested form; see there. The default is the one of the Medical Abstracts corpus.
        label_separator: what stands between the names of a path.
        encoder_name_or_path: Hub id or folder that the encoder's weights come from.
        encoder_revision: the commit of that repository. None for a folder.
        adapter_subfolder: the folder of the checkpoint that holds a PEFT adapter, beside the heads; None when the
            checkpoint holds the whole model.
        pooling: ``"mean"`` over the tokens that are not padding, or ``"cls"``, the first token.
        head_dropout: dropout probability before the heads.
        initializer_range: standard deviation of fresh head weights.
        lexical_vocab_size: the number of token ids that the lexical head knows; None where the model has no such head.
        lexical_weight: what the log-probabilities of the lexical head count in each decision, where those of the encoder count
            1; None where the model has no such head.
        temperatures: what the scores of each decision are divided by before their softmax, the roots' first, then those
            of the inner nodes' children in the order of ids; None, which is 1 for all, where nothing was calibrated.
        conformal_thresholds: for coverages of 0.01, 0.02, … 0.99, the threshold under which an answer holds the label
            of that share of documents; see `pipeline_hierarchical.conformal_answer`. None inside means every root. Of 999
            thresholds, for 0.001 … 0.999, which earlier versions stored, every tenth is kept.
        conformal_max_length: the number of tokens, special ones included, that the texts were truncated at to which the
            thresholds were fitted; None where that was not recorded.

    Raises:
        TaxonomyError: an unusable taxonomy, or labels that are not its leaves.
        ValueError: an unknown pooling; temperatures, thresholds or a length of a wrong number or range.
    """

    model_type = "hierarchical_text_classification"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["node_log_probs", "hidden_states", "attentions"]

    def __init__(
        self,
        text_config: dict | PretrainedConfig | None = None,
        taxonomy: "Taxonomy | list | dict | None" = None,
        label_separator: str = "/",
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
        **kwargs,
    ):
        if not isinstance(taxonomy, Taxonomy):
            taxonomy = Taxonomy(DEFAULT_TAXONOMY if taxonomy is None else taxonomy, label_separator)
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', not {pooling!r}")
        if isinstance(text_config, dict):
            text_config = encoder_config(text_config)
        elif text_config is not None and not isinstance(text_config, PretrainedConfig):
            raise ValueError(f"text_config must be the encoder's configuration, not {type(text_config).__name__}")
        encoder: PretrainedConfig = AutoConfig.for_model("bert") if text_config is None else text_config
        if getattr(encoder, "attention_type", None) == "block_sparse":
            encoder.attention_type = "original_full"  # the first short text would switch BigBird to it for good
        self.text_config = encoder
        self.taxonomy = taxonomy.to_nested()
        self.label_separator = taxonomy.separator
        self.encoder_name_or_path = encoder_name_or_path
        self.encoder_revision = encoder_revision
        self.adapter_subfolder = adapter_subfolder
        self.pooling = pooling
        self.head_dropout = head_dropout
        self.initializer_range = initializer_range
        if (lexical_vocab_size is None) != (lexical_weight is None):
            raise ValueError(
                "lexical_weight must be given where lexical_vocab_size is, and only there; a checkpoint without it comes from an "
                "earlier version of this code: load it by its own, with trust_remote_code=True, or train again"
            )
        self.lexical_vocab_size = lexical_vocab_size
        self.lexical_weight = lexical_weight
        self.temperatures = checked_temperatures(temperatures, taxonomy)
        self.conformal_thresholds = checked_thresholds(conformal_thresholds)
        if conformal_max_length is not None and not (type(conformal_max_length) is int and conformal_max_length >= 1):
            raise ValueError(f"conformal_max_length must be a whole number of tokens, not {conformal_max_length!r}")
        self.conformal_max_length = conformal_max_length

        leaves = taxonomy.labels[: taxonomy.num_leaves]
        given = kwargs.pop("id2label", None)
        expected = {str(i): label for i, label in enumerate(leaves)}
        if given is not None and (
            not isinstance(given, dict) or {str(i): compose(given[i]) for i in given} != expected
        ):
            raise TaxonomyError("id2label is not the list of the taxonomy's leaves; change the taxonomy instead")
        if kwargs.pop("num_labels", len(leaves)) != len(leaves):
            raise TaxonomyError(
                f"num_labels is not the {len(leaves)} leaves of the taxonomy; change the taxonomy instead"
            )
        kwargs.pop("label2id", None)
        super().__init__(
            id2label=dict(enumerate(leaves)), label2id={label: i for i, label in enumerate(leaves)}, **kwargs
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a stored configuration as in transformers, with two differences.

        What is given at loading is checked like what was stored: transformers sets it afterwards. What is stored of
        ``attn_implementation`` is left out: it can name a repository, whose code would be fetched at no pinned commit.
        """
        attention = ("attn_implementation", "_attn_implementation")  # the encoder's becomes that of the whole, or None
        config_dict = {name: value for name, value in config_dict.items() if name not in attention}
        own = {*inspect.signature(cls.__init__).parameters, "id2label", "label2id", "num_labels"}
        own -= {"self", "kwargs", "text_config"}
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in own}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @property
    def tree(self) -> Taxonomy:
        """The taxonomy as an object, built from ``taxonomy`` each time it is asked for."""
        return Taxonomy(self.taxonomy, self.label_separator)

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's output."""
        return self.text_config.hidden_size

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.text_config.hidden_size = value


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def encoder_config(given: dict) -> PretrainedConfig:
    """The configuration of an encoder, of the class that its ``model_type`` names in transformers. BERT's by default.

    Raises:
        ValueError: no such model type, or values that it does not take.
    """
    kind = given.get("model_type", "bert")
    try:
        return AutoConfig.for_model(kind, **{name: value for name, value in given.items() if name != "model_type"})
    except Exception as error:  # each configuration checks its values in its own way
        raise ValueError(f"text_config is no configuration of a {kind!r} model: {error}") from error


def checked_temperatures(temperatures: list[float] | None, taxonomy: Taxonomy) -> list[float] | None:
    """Temperatures that fit a taxonomy: one a decision, positive and finite."""
    decisions = taxonomy.num_nodes - taxonomy.num_leaves + 1
    if temperatures is None:
        return None
    positive = isinstance(temperatures, (list, tuple)) and all(
        is_number(value) and 0 < value < float("inf") for value in temperatures
    )
    if not positive or len(temperatures) != decisions:
        raise ValueError(f"temperatures must be {decisions} positive numbers, one for each decision of the taxonomy")
    return list(temperatures)


def checked_thresholds(thresholds: list[float | None] | None) -> list[float | None] | None:
    """Conformal thresholds: 99 rising numbers from 0 to 1, with None for those that no document of the rows gave.

    Earlier versions stored 999, for 0.001 … 0.999; every tenth of them is returned.
    """
    if thresholds is None:
        return None
    given = list(thresholds) if isinstance(thresholds, (list, tuple)) else []
    known = [value for value in given if value is not None]
    rising = all(map(is_number, known)) and all(
        0 <= one <= other <= 1 for one, other in zip([0, *known], [*known, 1], strict=True)
    )
    if len(given) not in (99, 999) or given[: len(known)] != known or not rising:
        raise ValueError("conformal_thresholds must be 99 rising numbers from 0 to 1, None at the end alone")
    return given[9::10] if len(given) == 999 else given
