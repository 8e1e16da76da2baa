"""Build and query a taxonomy, a forest of named nodes. This file imports the standard library
alone.

Worth knowing:

1. Nodes are numbered leaves first, in reading order, then inner nodes. So class index = leaf id =
   index into ``id2label``.
2. A node's label is its name, or its path (``parent/child``, and ``/root``) where two nodes share
   the name.
3. A decision is the choice among the roots, or among the children of one inner node. The decision
   at the roots has id 0, the one below inner node n has id n - num_leaves + 1.
"""

import difflib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal

DISEASES = [
    "neoplasms",
    "digestive system diseases",
    "nervous system diseases",
    "cardiovascular diseases",
]
DEFAULT_TAXONOMY = {"general pathological conditions": None, "specific disease": DISEASES}
MAX_DEPTH = 16
MAX_NODES = 100_000
MAX_NAME = 500  # characters
# the most that a message quotes from a user's file, see `looks_like_name`
SHOWN_CHARACTERS = 60
SHOWN_WORDS = 5
SHOWN_DIGITS = 4
LISTED_NAMES = 8
# control characters, halves of surrogate pairs, line and paragraph separators
UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")


class TaxonomyError(ValueError):
    """Error for an invalid taxonomy, or for a label that is not in the taxonomy.

    The message names the node.
    """


def looks_like_name(text: str) -> bool:
    """Return whether a text can be the name of a class or column, and not patient text, a date or
    an identifier.
    """
    digits = sum(map(str.isdigit, text))
    short = len(text) <= SHOWN_CHARACTERS and len(text.split()) <= SHOWN_WORDS
    return (
        short
        and digits <= max(SHOWN_DIGITS, len(text) // 2)
        and not re.search(r"[.?!](\s|$)|[。！？]", text)
    )


def quote_name(value: object) -> str:
    """Quote a name for a message.

    A text that does not look like a name is replaced by its length.
    """
    if isinstance(value, tuple):
        return f"({', '.join(map(quote_name, value))})"
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    text = str(value)
    return repr(value) if looks_like_name(text) else f"(a value of {len(text):,} characters)"


def list_names(names: Sequence[str]) -> str:
    """Quote the first names, and count the others."""
    more = f" and {len(names) - LISTED_NAMES:,} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(map(quote_name, names[:LISTED_NAMES])) + more or "none"


class Taxonomy:
    """A forest of named nodes, of any depth up to 16, with leaves at any depth.

    Args:
        tree: the forest, nested. A leaf is a string; an inner node is a one-item mapping of its
        name to its children.
            Mappings with several items and leaves without children, such as ``{"a": {"b": None,
            "c": ["d", "e"]}}``, are accepted too. TaxonomyError: the forest is invalid.
        separator: separator between the names of a path.
        descriptions: phrases that describe nodes, by label; not every node needs one.

    Attributes:
        names, parents, levels, labels: one entry per node. A root has parent -1 and level 1.
        reading_order: the ids of all nodes, each parent before its children, as a tree is drawn.
        num_leaves, num_nodes, depth: ids below ``num_leaves`` are leaves; ``depth`` is the deepest
        level.
    """

    def __init__(
        self,
        tree: Sequence | dict,
        separator: str = "/",
        descriptions: dict[str, str] | None = None,
    ):
        if not isinstance(separator, str) or not separator:
            raise TaxonomyError(f"the label separator must be a non-empty text, not {separator!r}")
        if not isinstance(tree, (list, tuple, dict)):
            raise TaxonomyError("a taxonomy is a list or a mapping of names")
        self.separator = separator
        self.descriptions = descriptions or {}
        is_inner: dict[tuple[str, ...], bool] = {}  # by path, in reading order
        for path, has_children in _walk(_named(tree)):
            if path in is_inner:
                where = f"under {quote_name(path[-2])}" if len(path) > 1 else "among the roots"
                raise TaxonomyError(f"the name {quote_name(path[-1])} occurs twice {where}")
            is_inner[path] = has_children
            if len(is_inner) > MAX_NODES:
                raise TaxonomyError(f"the taxonomy has more than {MAX_NODES:,} nodes")
        self.num_nodes = len(is_inner)
        self.num_leaves = self.num_nodes - sum(is_inner.values())
        if self.num_leaves < 2:
            raise TaxonomyError(
                f"a taxonomy needs at least two leaves; this one has {self.num_leaves}"
            )
        # stable: leaves first, in reading order
        self._paths = sorted(is_inner, key=is_inner.__getitem__)
        self.node_of_path = {path: i for i, path in enumerate(self._paths)}
        self.reading_order = [self.node_of_path[path] for path in is_inner]
        self.names = [path[-1] for path in self._paths]
        self.levels = [len(path) for path in self._paths]
        self.depth = max(self.levels)
        self.parents = [self.node_of_path.get(path[:-1], -1) for path in self._paths]
        self._children: dict[int, list[int]] = {}
        for node in self.reading_order:
            self._children.setdefault(self.parents[node], []).append(node)

        uses = Counter(self.names)
        self.labels = []
        self._ids: dict[str, int] = {}
        for i, path in enumerate(self._paths):
            written = separator.join(path)
            if len(path) == 1 and uses[written] > 1:
                written = separator + written  # a root's path would be its bare name
            self.labels.append(written if uses[path[-1]] > 1 else path[-1])
            # a separator may begin or end with a space
            for key in {written.strip(), self.labels[i].strip()}:
                if self._ids.setdefault(key, i) != i:
                    problem = (
                        f"{quote_name(key)} is both the name of a node and the path to another"
                    )
                    raise TaxonomyError(f"{problem}; choose another label separator")

    def to_nested(self, node: int = -1) -> list:
        """Return the forest below a node, or all, as nested lists: leaves are names, inner nodes
        ``{name: […]}``.
        """
        return [
            self.names[child]
            if child < self.num_leaves
            else {self.names[child]: self.to_nested(child)}
            for child in self.children(node)
        ]

    def children(self, node: int) -> list[int]:
        """Return the ids of the children of a node, or of the roots for -1."""
        return self._children.get(node, [])

    @cached_property
    def leaves_at_or_below(self) -> list[list[int]]:
        """For each node the ids of the leaves at or below it, in ascending order."""
        below: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for leaf in range(self.num_leaves):
            for node in self.path(leaf):
                below[node].append(leaf)
        return below

    @cached_property
    def decisions(self) -> list[list[int]]:
        """For each decision the nodes that it chooses among, ascending: the roots, then each inner
        node's children.
        """
        return [
            sorted(self.children(node)) for node in (-1, *range(self.num_leaves, self.num_nodes))
        ]

    @cached_property
    def decision_of(self) -> list[int]:
        """For each node the id of the decision that chooses it or one of its siblings."""
        return [0 if parent < 0 else parent - self.num_leaves + 1 for parent in self.parents]

    def with_ancestors(self, nodes: Iterable[int]) -> set[int]:
        return {ancestor for node in nodes for ancestor in self.path(node)}

    def deepest(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes without a descendant among them, in ascending order."""
        nodes = set(nodes)
        return sorted(nodes - {ancestor for node in nodes for ancestor in self.path(node)[:-1]})

    def path(self, node: int) -> list[int]:
        """Return the ids from the root to the node."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    @cached_property
    def _equal_nodes(self) -> dict[str | tuple[str, ...], set[int]]:
        """The ids of the nodes with a name, label or path, by its form of `normalise`."""
        nodes: dict[str | tuple[str, ...], set[int]] = defaultdict(set)
        for label, node in self._ids.items():
            nodes[normalise(label)].add(node)
        for path, node in self.node_of_path.items():
            normalised = tuple(map(normalise, path))
            nodes[normalised].add(node)
            nodes[normalised[-1]].add(node)
        return dict(nodes)

    def find_path(self, names: tuple[str, ...]) -> int | None:
        """Return the node with this path, or the only one equal by `normalise`, or None."""
        if names in self.node_of_path:
            return self.node_of_path[names]
        equal = [*self._equal_nodes.get(tuple(map(normalise, names)), ())]
        return equal[0] if len(equal) == 1 else None

    def id(self, label: str) -> int:
        """Return the id of the node with this label or path, or the only one equal by `normalise`.

        TaxonomyError: no node has it, or several nodes share the name.
        """
        key = to_nfc(label.strip())
        if key in self._ids:
            return self._ids[key]
        equal = sorted(self._equal_nodes.get(normalise(key), ()))
        if len(equal) == 1:
            return equal[0]
        if equal:
            paths = " and ".join(quote_name(self.labels[node]) for node in equal[:3])
            raise TaxonomyError(
                f"the label {quote_name(label)} is ambiguous: it names {paths}; write the path"
            )
        near = nearest_name(key, self._ids)
        few = ", ".join(map(quote_name, self.labels[:5]))
        hint = f"it has {few}, …" if near is None else f"did you mean {quote_name(near)}?"
        raise TaxonomyError(f"the label {quote_name(label)} is not in the taxonomy; {hint}")

    def known_nodes(self, old: "Taxonomy", renamed: dict[str, str] | None = None) -> dict[int, int]:
        """Return the id in an earlier taxonomy of each node that it has, by the node's id.

        It is the node with the same path. Without one, it is the node that moved: the only one of
        this name in both taxonomies. Taxonomies without a path in common have no node in common.
        ``renamed`` are the new names of earlier nodes, by label.

        TaxonomyError: there is no such node, or name, or two nodes would be one.
        """
        names = list(old.names)
        for label, name in (renamed or {}).items():
            if name not in self.names:
                raise TaxonomyError(
                    f"{quote_name(label)} is renamed to {quote_name(name)}, which is not in "
                    "the taxonomy"
                )
            names[old.id(label)] = name
        path_of = {
            node: tuple(names[parent] for parent in old.path(node)) for node in range(old.num_nodes)
        }
        node_of = {path: node for node, path in path_of.items()}
        if replaced := path_of.keys() - node_of.values():
            one = min(replaced)
            other = node_of[path_of[one]]
            both = f"{quote_name(old.labels[one])} and {quote_name(old.labels[other])}"
            raise TaxonomyError(f"{both} would be one node: rename both, or neither")
        shared = [path for path in node_of if path in self.node_of_path]
        known = {self.node_of_path[path]: node_of[path] for path in shared}
        if not known:
            return {}
        uses = Counter(self.names), Counter(names)
        moved = {
            name: node for node, name in enumerate(names) if all(count[name] == 1 for count in uses)
        }
        return {node: moved[name] for node, name in enumerate(self.names) if name in moved} | known

    def draw(self) -> str:
        """Draw the forest as text, one node a line, with descriptions."""

        def draw(node: int) -> Iterator[str]:
            description = self.descriptions.get(self.labels[node])
            yield f"{self.names[node]} – {description}" if description else self.names[node]
            children = self.children(node)
            for child in children:
                first, rest = ("└── ", "    ") if child == children[-1] else ("├── ", "│   ")
                for i, line in enumerate(draw(child)):
                    yield (rest if i else first) + line

        return "\n".join(chain.from_iterable(map(draw, self.children(-1))))

    def __deepcopy__(self, memo: dict) -> "Taxonomy":
        # nothing changes a taxonomy, and every copy of a configuration would copy its tree
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Taxonomy) and (self._paths, self.separator) == (
            other._paths,
            other.separator,
        )


def to_nfc(name: Any) -> Any:
    """Convert a string to Unicode normal form NFC. Return any other value unchanged."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def normalise(text: str, form: Literal["NFC", "NFKC"] = "NFKC") -> str:
    """Return a text in a Unicode normal form, without format characters, and with single spaces.

    Names that differ in width, ligatures or superscripts are equal in NFKC. Case is kept.
    """
    if not text.isascii():
        for character in set(text):
            if unicodedata.category(character) == "Cf":  # zero-width characters, soft hyphens, …
                text = text.replace(character, "")
        text = unicodedata.normalize(form, text)
    return " ".join(text.split())


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a user may have meant: equal but for case, else similar, if any is."""
    names = list(names)
    near = [other for other in names if other.casefold() == name.casefold()]
    return next(iter(near or difflib.get_close_matches(name, names, n=1)), None)


def _named(children: Sequence | dict) -> list[tuple[Any, Any]]:
    """Return the pairs (name, nested children) of a nested form."""
    if isinstance(children, dict):
        return list(children.items())
    pairs = (child.items() if isinstance(child, dict) else [(child, None)] for child in children)
    return list(chain.from_iterable(pairs))


def _walk(
    named: list[tuple[Any, Any]], parent: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Check the nodes below a parent; yield each one's path, and whether it has children, in
    reading order.
    """
    for name, below in named:
        name = to_nfc(name)
        if problem := _problem(name, below, parent):
            raise TaxonomyError(problem)
        path = (*parent, name)
        children = _named(below or ())
        yield path, bool(children)
        yield from _walk(children, path)


def _problem(name: Any, below: Any, parent: tuple[str, ...]) -> str | None:
    def place() -> str:  # quoted only in messages: for each name, it takes longer than all checks
        return " > ".join(map(quote_name, parent)) or "the top level"

    if not isinstance(name, str):
        return f"a name must be text, but {place()} holds {quote_name(name)}; put it in quotes"
    if not name.strip():
        return f"an empty name at {place()}"
    if len(name) > MAX_NAME:
        return f"a name at {place()} has {len(name):,} characters, at most {MAX_NAME} are supported"
    if name != name.strip() or any(unicodedata.category(c) in UNWRITABLE for c in name):
        return f"the name {quote_name(name)} has white space around it or a control character in it"
    if below is not None and not isinstance(below, (list, tuple, dict)):
        return (
            f"the children of {quote_name(name)} must be a list or a mapping, not "
            f"{quote_name(below)}"
        )
    if len(parent) == MAX_DEPTH:
        return (
            f"{quote_name(name)} is at level {MAX_DEPTH + 1}; at most {MAX_DEPTH} levels are "
            "supported"
        )
    return None
