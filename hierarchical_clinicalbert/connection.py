"""Find out within seconds whether the Hub can be reached.

huggingface_hub repeats its request for a file that is not in the cache for 23 seconds, or for six minutes if no answer comes. A model
has a dozen files. So one request goes before all others, and if it gets no answer, no other request is made.
"""

import threading
import time
from functools import cache

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session

from hierarchical_clinicalbert.errors import one_line

ANSWER_SECONDS = 20  # to look up the name, connect and answer


@cache
def find_hub_problem() -> str | None:
    """Return why the Hub cannot be used, or None if it answers, with any status. It is asked once in a process.

    Without an answer, huggingface_hub is offline from then on: it takes files from its cache, and other files fail at once.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    problems: list[str | None] = []

    def ask() -> None:
        for pause in (0, 1, 2):  # what fails at once may work a little later
            time.sleep(pause)
            try:
                get_session().head(constants.ENDPOINT, follow_redirects=False, timeout=2 * ANSWER_SECONDS)
                return problems.append(None)
            except Exception as error:  # it is reported below
                problems.append(f"{type(error).__name__}: {one_line(error)}")

    # in a thread, because the client's time limit holds for each address of the host, and not for the look-up of its name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    problem = problems[-1] if problems else f"no answer within {ANSWER_SECONDS} seconds"
    if problem is None:
        return None
    constants.HF_HUB_OFFLINE = True
    return f"the connection to {constants.ENDPOINT} failed ({problem})"
