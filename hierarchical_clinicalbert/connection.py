"""Find out within seconds whether the Hub can be reached.

huggingface_hub repeats its request for a file that is not in the cache for 23 seconds, or for six minutes if no answer comes. A model
has a dozen files. So one request goes before all others, and if it gets no answer, no other request is made.
"""

import threading
import time
from functools import cache
from typing import Any

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session, httpx

from hierarchical_clinicalbert.errors import describe_error

CONNECTION_SECONDS = 8  # to look up the name, try all addresses, agree on TLS, and repeat what failed at once
ANSWER_SECONDS = 60  # from the connection to the answer, as long as huggingface_hub waits for a slow Hub


@cache
def find_hub_problem() -> str | None:
    """Return why the Hub cannot be used, or None if it answers, with any status. It is asked once in a process.

    Without an answer, huggingface_hub is offline from then on: it takes files from its cache, and other files fail at once.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    connected, problems = threading.Event(), list[str | None]()

    def note_connection(event: str, _: dict[str, Any]) -> None:
        if event.endswith("send_request_headers.started"):
            connected.set()

    def ask() -> None:
        options: dict[str, Any] = {"timeout": ANSWER_SECONDS, "extensions": {"trace": note_connection}}
        for pause in (0, 1, 2):  # what fails at once may work a little later
            time.sleep(pause)
            try:
                get_session().head(constants.ENDPOINT, follow_redirects=False, **options)
                problems.append(None)
                break
            except httpx.TimeoutException:
                problems.append(f"no answer within {ANSWER_SECONDS} seconds")
                break
            except Exception as error:  # it is reported below
                problems.append(describe_error(error))
        connected.set()

    # in a thread, because the client's time limit holds for each address of the host, and not for the look-up of its name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    problem: str | None = f"no connection within {CONNECTION_SECONDS} seconds"
    if connected.wait(CONNECTION_SECONDS):
        thread.join()
        problem = problems[-1]
    if problem is None:
        return None
    constants.HF_HUB_OFFLINE = True
    return f"the connection to {constants.ENDPOINT} failed ({problem})"
