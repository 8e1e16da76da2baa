"""Measure how strange a text is to a model, and how frequent the classes are in other texts than it
was fitted to.

Worth knowing:

1. The strangeness of a text is the Mahalanobis distance of its vector from the nearest class.
   Classes have a normal distribution each, with a covariance in common (Lee et al., 2018, "A simple
   unified framework for detecting out-of-distribution samples"; for encoders of text: Podolskiy et
   al., 2021, "Revisiting Mahalanobis distance for transformer-based out-of-domain detection"). The
   energy of `Decisions.energy` is added, scaled so that both vary equally among validation texts.
   On CLINC150, the sum is better than either (`benchmarks/open_world.py`).
2. The p-value of a text is the share of validation texts that are at least as strange, the text
   itself included. If the text is drawn like them, its p-value is at most α with probability at
   most α (Bates et al., 2023, "Testing for outliers with conformal p-values").
3. `evaluation.open_world` fits the numbers that are stored here. No vector of a single training
   text is among them: a class that one text has counts as its parent.
4. Probabilities are calibrated for the class frequencies of the validation rows, the *prior*.
   `Decisions.adapt` corrects them for another prior. It assumes label shift: texts of one class
   look the same in both populations.
5. `estimate_prior` needs no labels. `benchmarks/shift.py` measures what it gains, and that it does
   no harm where nothing shifted.
"""

from collections.abc import Mapping
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

try:
    from .configuration_hierarchical import Calibration
    from .decisions_hierarchical import Decisions
    from .taxonomy_hierarchical import Taxonomy, quote_name
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from configuration_hierarchical import Calibration
    from decisions_hierarchical import Decisions
    from taxonomy_hierarchical import Taxonomy, quote_name

STRANGE = 0.05  # the largest p-value of a text that is counted, and shown, as strange
MAX_REFERENCES = 999
# numbers: 4 MB. In half precision, 1,500 nodes at BERT's base size take less
FULL_PRECISION = 10**6
MAX_STEPS = 1000  # of the EM algorithm
TOLERANCE = 1e-6  # largest change of a frequency in its last step
# with as many validation texts a class, the fitted prior counts as much as the new texts
FITTED_TEXTS = 7.0
SIGNIFICANCE = 0.05  # of a shift, corrected for the number of classes (Bonferroni)


# ── Texts that belong nowhere ─────────────────────────────────────────────────────────────────────


class OpenWorld(nn.Module):
    """Strangeness of texts, and its p-values.

    Args:
        num_references: number of validation texts whose strangeness is stored.

    Attributes:
        center: mean of the training texts' vectors, (H,).
        whitening: turns vectors minus ``center`` into vectors whose covariance within the classes
            is the identity, (H, H).
        means: whitened means of the classes, (N + 1, H). A class is a node with the texts that have
            no label below it. The last class is of texts without a label. Both are in half
            precision if all tensors, with `MAX_REFERENCES`, would hold more than `FULL_PRECISION`
            numbers.
        shares: share of the training texts in each class, (N + 1,).
        energy_weight: factor of the energy, (1,).
        references: strangeness of validation texts in ascending order, (num_references,).
    """

    def __init__(self, tree: Taxonomy, hidden_size: int, num_references: int):
        super().__init__()
        self.tree = tree
        num_classes = tree.num_nodes + 1
        most = hidden_size * (hidden_size + num_classes + 1) + num_classes + 1 + MAX_REFERENCES
        precision = torch.float32 if most <= FULL_PRECISION else torch.float16
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "center": ((hidden_size,), torch.float32),
            "whitening": ((hidden_size, hidden_size), precision),
            "means": ((num_classes, hidden_size), precision),
            "shares": ((num_classes,), torch.float32),
            "energy_weight": ((1,), torch.float32),
            "references": ((num_references,), torch.float32),
        }
        for name, (shape, kind) in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False)
            )

    def distances(self, vectors: Tensor) -> Tensor:
        """Return Mahalanobis distances of vectors (B, H) from all classes, (B, N + 1); infinite
        from one without texts.
        """
        whitened = (
            vectors.to(self.center.device, torch.float32) - self.center
        ) @ self.whitening.float()
        means = self.means.float()
        squares = means.square().sum(1).where(self.shares > 0, torch.inf)
        return (
            (whitened.square().sum(1, keepdim=True) - 2 * whitened @ means.T + squares)
            .clamp(min=0)
            .sqrt()
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the strangeness of texts, (B,), from the model's ``vectors``, (B, H + 1)."""
        energies = vectors[:, -1].to(self.center.device)
        return self.distances(vectors[:, :-1]).amin(1) + self.energy_weight * energies

    @property
    def has_references(self) -> bool:
        """Whether there are references.

        There are none after a change of the taxonomy, and on a meta device they cannot be read.
        """
        return not self.references.is_meta and len(self.references) > 0

    def p_values(self, strangeness: Tensor) -> Tensor:
        """Return the p-values of texts, (B,) in float64 on the CPU: (1 + number of references at
        least as strange) / (n + 1).
        """
        references = self.references.float().cpu()  # a user may have cast the model
        num_below = torch.searchsorted(references, strangeness.float().cpu())
        return (1 + len(references) - num_below).double() / (len(references) + 1)

    # ── Class means, for classes that are added without training ──────────────────────────────────

    @property
    def variances(self) -> Tensor:
        """Variances within the classes along the columns of ``whitening``, (H,): each column is
        a direction over its deviation.
        """
        return 1 / self.whitening.float().square().sum(0)

    def class_means(self) -> Tensor:
        """Return the means of the classes in the space of the texts' vectors, (N + 1, H)."""
        return (self.means.float() * self.variances) @ self.whitening.float().T + self.center

    def of_nodes(self, tree: Taxonomy, known: Mapping[int, int]) -> "OpenWorld":
        """Return what is known of the nodes of another taxonomy, where ``known`` gives their ids
        here, without references.
        """
        other = OpenWorld(tree, len(self.center), 0)
        state = self.state_dict() | {"references": self.references[:0]}
        for name in ("means", "shares"):
            state[name] = torch.zeros_like(getattr(other, name))
            state[name][[*known, -1]] = getattr(self, name)[[*known.values(), -1]].to(state[name])
        other.load_state_dict(state)
        return other.to(self.center.device)


# ── Other class frequencies ───────────────────────────────────────────────────────────────────────


def fitted_prior(calibration: Calibration) -> Tensor:
    """Return the class frequencies for which the probabilities are calibrated, (num_classes,).

    ValueError: there are none.
    """
    if calibration.prior is None:
        raise ValueError(
            "this checkpoint does not store the class frequencies of its validation rows, "
            "which prior needs"
        )
    return torch.tensor(calibration.prior, dtype=torch.float64)


def read_prior(decisions: Decisions, calibration: Calibration, given: Any) -> Tensor:
    """Return given class frequencies as (num_classes,), scaled to a sum of 1 where a text has one
    class.

    Args:
        given: a list in the order of the classes, or a mapping from their labels.

    Raises:
        ValueError: the frequencies do not fit the classes, or see `fitted_prior`.
    """
    num_classes = len(fitted_prior(calibration))
    labels = decisions.tree.labels[:num_classes]
    if isinstance(given, Mapping):
        for label in [
            *(label for label in labels if label not in given),
            *(given.keys() - {*labels}),
        ]:
            raise ValueError(
                "prior needs the frequency of each class, and of nothing else: see "
                f"{quote_name(label)}"
            )
        given = [given[label] for label in labels]
    if not isinstance(given, (list, tuple)) or len(given) != num_classes:
        raise ValueError(
            f"prior must be a list of {num_classes} frequencies, or a mapping from the "
            "classes' labels"
        )
    if not all(isinstance(share, Real) and 0 <= float(share) < float("inf") for share in given):
        raise ValueError("prior: the frequency of a class must be a number of at least 0")
    return decisions.check_prior(torch.tensor(given, dtype=torch.float64))


def estimate_prior(decisions: Decisions, calibration: Calibration, probabilities: Tensor) -> Tensor:
    """Estimate the class frequencies of unlabelled texts, (num_classes,), from calibrated
    probabilities (B, num_classes).

    This is the EM algorithm of Saerens, Latinne and Decaestecker, 2002, "Adjusting the outputs of a
    classifier to new a priori probabilities", with a prior distribution: with few validation texts,
    small errors of the calibration would look like other frequencies. For the same reason, the
    frequencies stay those of the fit unless the mean probability of a class differs significantly
    (Lipton, Wang and Smola, 2018, "Detecting and correcting for label shift with black box
    predictors").
    """
    fitted = fitted_prior(calibration)
    num_fitted = calibration.num_texts or 1
    num_texts = len(probabilities)

    # ── Is there a shift? ─────────────────────────────────────────────────────────────────────────
    gaps = (probabilities.double().mean(0) - fitted).abs()
    # an upper bound, because probabilities vary less than labels
    noise = (fitted * (1 - fitted) * (1 / num_texts + 1 / num_fitted)).sqrt()
    if (gaps <= NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * len(fitted))) * noise).all():
        return fitted

    # ── Expectation and maximisation ──────────────────────────────────────────────────────────────
    # of the fitted frequencies, relative to the texts
    weight = FITTED_TEXTS * len(fitted) / num_fitted
    prior = fitted
    for _ in range(MAX_STEPS):
        # all rows at once would take several times their memory
        of_rows = (
            decisions.adapt_classes(rows.double(), fitted, prior).sum(0)
            for rows in probabilities.split(1024)
        )
        last = prior
        prior = (sum(of_rows) / num_texts + weight * fitted) / (1 + weight)
        if (prior - last).abs().max() < TOLERANCE:
            break
    return prior
