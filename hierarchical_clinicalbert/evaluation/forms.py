"""Choose what differs in evaluation between the two forms of label."""

import re

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.evaluation.many_nodes import ManyNodesForm
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from taxonomy_hierarchical import Taxonomy

Form = OnePathForm | ManyNodesForm
FORMS: dict[str, type[Form]] = {SINGLE_LABEL: OnePathForm, MULTI_LABEL: ManyNodesForm}


def form_of(tree: Taxonomy, problem_type: str) -> Form:
    """Return what differs for a taxonomy and a form of label, ``problem_type`` of the configuration."""
    return FORMS[problem_type](tree)


def direction_of(name: str) -> int:
    """Return `Metric.direction` of a metric of either form: 1 if higher is better, -1 if lower is, 0 for unknown ones."""
    pattern = re.sub(r"^level_\d+_", "level_{}_", name.removeprefix("eval_"))
    directions = [form.metrics[pattern].direction for form in FORMS.values() if pattern in form.metrics]
    return min(directions, default=0)
