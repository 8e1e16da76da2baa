"""What the commands are made of: arguments, data, losses, trainer, metrics, plots, card."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do."""


def one_line(error: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
