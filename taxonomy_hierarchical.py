"""Read and query a taxonomy, a forest of named nodes. This file uses no torch and no numpy.

Worth knowing:

1. Nodes are numbered leaves first, in reading order, then inner nodes. So class index = leaf id = index into
   ``id2label``.
2. A node's label is its name, or its path (``parent/child``, and ``/root``) where two nodes share the name. Case is
   kept.
3. A decision is the choice among the roots, or among the children of one inner node. The decision at the roots has id
   0, the one below inner node n has id n - num_leaves + 1.
4. Questions about the tree (ancestors, leaves below, decisions) are members of `Taxonomy`, most of them cached.
"""

import csv
import difflib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

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
MAX_DEPTH = 16
MAX_NODES = 100_000
MAX_NAME = 500  # characters
# the most that a message quotes from a user's file, see `looks_like_name`
SHOWN_CHARACTERS, SHOWN_WORDS, SHOWN_DIGITS = 60, 5, 4
NEAR = 0.85  # similarity by difflib from which one name may be a misspelling of another
MOST_COMPARED = 1_000_000  # pairs of names, a few seconds
UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, line and paragraph separators


class TaxonomyError(ValueError):
    """A taxonomy that cannot be read, or a label that it does not hold. The message names the node."""


def looks_like_name(text: str) -> bool:
    """Return whether a text can be the name of a class or column, and not patient text, a date or an identifier.

    A name has at most 60 characters and 5 words, and ends no sentence. With more than 4 digits, at most half are
    digits.
    """
    digits = sum(map(str.isdigit, text))
    return (
        len(text) <= SHOWN_CHARACTERS
        and len(text.split()) <= SHOWN_WORDS
        and digits <= max(SHOWN_DIGITS, len(text) // 2)
        and re.search(r"[.?!](\s|$)|[。！？]", text) is None
    )


def quote_name(value: object) -> str:
    """Quote a name for a message. A text that does not look like a name is replaced by its length."""
    if isinstance(value, tuple):
        return f"({', '.join(map(quote_name, value))})"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    text = str(value)
    return repr(value) if looks_like_name(text) else f"(a value of {len(text):,} characters)"


class WithoutAliases:
    """A mixin for PyYAML's loaders that refuses aliases, with which a few lines can stand for any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        import yaml

        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            problem = "an alias (*name) is not supported: write out what the alias stands for"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[attr-defined]
        return super().compose_node(parent, index)  # type: ignore[misc]


def yaml_problem(error: Exception) -> str:
    """Return the error message of PyYAML, without the lines of the file that it quotes."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
    return problem if mark is None else f"{problem}, line {mark.line + 1}"


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
        """Return every node's path in reading order, and whether it has children."""
        paths: list[tuple[str, ...]] = []
        has_children: list[bool] = []
        seen: set[tuple[str, ...]] = set()
        stack: list[tuple[tuple[str, ...], Sequence | dict]] = [((), tree)]
        while stack:
            parent, children = stack.pop()
            items = children.items() if isinstance(children, dict) else enumerate(children)
            named = []
            for key, value in items:
                if isinstance(children, dict):
                    named.append((key, value))
                elif isinstance(value, dict):
                    named.extend(value.items())
                else:
                    named.append((value, None))
            named = [(compose(name), below) for name, below in named]
            stack.extend(((*parent, name), below or ()) for name, below in reversed(named))
            if len(paths) + len(stack) > MAX_NODES:
                raise TaxonomyError(f"the taxonomy has more than {MAX_NODES:,} nodes")
            if parent:
                paths.append(parent)
                has_children.append(bool(named))
                if parent in seen:
                    where = f"under {quote_name(parent[-2])}" if len(parent) > 1 else "among the roots"
                    raise TaxonomyError(f"the name {quote_name(parent[-1])} occurs twice {where}")
                seen.add(parent)
            for name, below in named:
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
        """Build a taxonomy from (parent, child) pairs of names.

        A child without a parent is a root, and so is a parent that is no node's child. If the name of such a parent
        resembles another node's, a warning names both.

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
                first, second = (quote_name(p) if p else "no parent" for p in (parent_of[child], parent))
                raise TaxonomyError(f"{quote_name(child)} has two parents: {first} and {second}")
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
            while (above := str(parent_of[chain[-1]])) not in chain:  # every node of a cycle has a parent
                chain.append(above)
            cycle = chain[chain.index(above) :]
            raise TaxonomyError(
                "the taxonomy has a cycle: " + " > ".join(map(quote_name, [*reversed(cycle), cycle[-1]]))
            )
        return cls([reached[name] for name in roots], separator)

    @classmethod
    def from_paths(cls, paths: Iterable[str | Sequence[str]], separator: str = "/") -> "Taxonomy":
        """Build a taxonomy from paths: ``"parent/child"`` texts, or sequences of names from the root down.

        Empty names at the end of a sequence are ignored.

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
        """Read a taxonomy from a file: nested ``.yaml``/``.yml``/``.json``, or ``.csv``/``.tsv`` rows with a ``parent`` column and a
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
        """Return the forest as nested lists: a leaf is its name, an inner node ``{name: [children]}``."""
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
        """Return the ids of the children of a node, or of the roots for -1."""
        return self._children.get(node, [])

    @cached_property
    def ancestors(self) -> list[list[int]]:
        """For each node the ids from the root to the node itself, padded with ``num_nodes`` to length ``depth``."""
        return [[*path, *[self.num_nodes] * (self.depth - len(path))] for path in map(self.path, range(self.num_nodes))]

    @cached_property
    def leaves_below(self) -> list[list[int]]:
        """For each node the ids of the leaves at or below it, in ascending order."""
        below: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for leaf in range(self.num_leaves):
            for node in self.path(leaf):
                below[node].append(leaf)
        return below

    @cached_property
    def nodes_below(self) -> list[list[int]]:
        """For each node the ids of all nodes below it."""
        below: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node in range(self.num_nodes):
            for ancestor in self.path(node)[:-1]:
                below[ancestor].append(node)
        return below

    @cached_property
    def decisions(self) -> list[list[int]]:
        """For each decision the nodes that it chooses among, ascending: the roots, then each inner node's children."""
        return [sorted(self.children(node)) for node in (-1, *range(self.num_leaves, self.num_nodes))]

    @cached_property
    def decision_of(self) -> list[int]:
        """For each node the id of the decision that chooses it or one of its siblings."""
        return [0 if parent < 0 else parent - self.num_leaves + 1 for parent in self.parents]

    def count_at_or_below(self, labels: Iterable[int]) -> list[int]:
        """Count, for each node, the labels at or below it.

        Args:
            labels: node ids; negative ones are ignored.
        """
        counts = [0] * self.num_nodes
        for label, count in Counter(labels).items():
            for node in self.path(label) if label >= 0 else ():
                counts[node] += count
        return counts

    def with_ancestors(self, nodes: Iterable[int]) -> set[int]:
        """Return nodes and all their ancestors."""
        return {ancestor for node in nodes for ancestor in self.path(node)}

    def deepest(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes that are no other one's ancestors, in ascending order."""
        nodes = set(nodes)
        return sorted(nodes - {ancestor for node in nodes for ancestor in self.path(node)[:-1]})

    def path(self, node: int) -> list[int]:
        """Return the ids from the root to the node, the node included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def path_names(self, node: int) -> tuple[str, ...]:
        """Return the names from the root to the node."""
        return self._paths[node]

    def id(self, label: str) -> int:
        """Return the id of the node with this label or path.

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
        """Draw the forest as text, one node a line."""
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
    """Return a name in Unicode form NFC, and anything but a text unchanged."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _warn_of_misspelt_roots(parents: list[str], names: set[str], children: dict[str, list[str]]) -> None:
    """Warn of roots whose name resembles another node's. Large taxonomies, where this takes long, are skipped."""
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
        columns = ", ".join(map(quote_name, header))
        raise TaxonomyError(f"expected columns 'parent' and 'child' (or 'name', 'node'), found {columns}")
    if header.count("parent") > 1 or header.count(child) > 1:
        raise TaxonomyError(f"two columns of the taxonomy are called 'parent', or {child!r}")
    for number, fields in enumerate(rows, start=1):
        if len(fields) != len(header):
            raise TaxonomyError(
                f"row {number} of the taxonomy has {len(fields)} fields, where the header has {len(header)}"
            )
    return [(fields[header.index("parent")], fields[header.index(child)]) for fields in rows]
