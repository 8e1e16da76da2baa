"""Choose what differs in evaluation between the two forms of label."""

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
    """Return `Metric.direction` of a metric of either form: -1 if lower is better. Those of levels, and unknown ones, are 0."""
    metric = name.removeprefix("eval_")
    return min((form.metrics[metric].direction for form in FORMS.values() if metric in form.metrics), default=0)
