"""Set the number of examples for all tests that draw inputs with Hypothesis."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

from hierarchical_clinicalbert.errors import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # the suite has a time limit for each test
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Allow the block to raise an `InputError` with a message of one line.

    Any other exception fails the test.
    """
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
