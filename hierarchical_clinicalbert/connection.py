"""Find out within seconds whether the Hub can be reached.

huggingface_hub repeats its request for a file that is not in the cache for 23 seconds, or for six
minutes if no answer comes. A model has a dozen files. So one request goes before all others, and if
it gets no answer, no other request is made.
"""

from functools import cache

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session

from hierarchical_clinicalbert.errors import one_line

ANSWER_SECONDS = 10  # to connect, and to answer


@cache
def go_offline_without_hub() -> str | None:
    """Set huggingface_hub offline if the Hub does not answer. It is asked once in a process.

    Offline, huggingface_hub takes files from its cache, and other files fail at once. Return why
    the Hub cannot be used, or None if it answers, with any status.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, follow_redirects=False, timeout=ANSWER_SECONDS)
    # of httpx, for the name, the connection, the certificate or the time
    except Exception as error:
        constants.HF_HUB_OFFLINE = True
        return (
            f"the connection to {constants.ENDPOINT} failed ({type(error).__name__}: "
            f"{one_line(error)})"
        )
    return None
