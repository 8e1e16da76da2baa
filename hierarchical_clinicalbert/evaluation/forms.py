"""Choose what differs in evaluation between the two forms of label."""

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.evaluation.many_nodes import ManyNodesForm
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from taxonomy_hierarchical import Taxonomy

Form = OnePathForm | ManyNodesForm


def form_of(tree: Taxonomy, problem_type: str) -> Form:
    """Return what differs for a taxonomy and a form of label, ``problem_type`` of the configuration."""
    forms: dict[str, type[Form]] = {SINGLE_LABEL: OnePathForm, MULTI_LABEL: ManyNodesForm}
    return forms[problem_type](tree)
