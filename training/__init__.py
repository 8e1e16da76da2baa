"""What the commands are made of: arguments, data, losses, trainer, metrics, plots, card."""

import logging

# it asks for kernels from the Hub, which would run code that is not pinned, and warns of every cast of 8-bit layers
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do."""
