"""How often Hypothesis draws, for all tests that draw inputs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

from errors import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # the suite's time limit holds for each test
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Let what is inside raise an `InputError` whose message is one line, and no other exception."""
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
