"""Say why bytes are not text of an encoding, and offer one that fits."""

import codecs
import re


class Encoding:
    """The encoding of a source of text, and why a part of the source is not text of this encoding.

    A problem offers an encoding that fits, as far as can be told: UTF-16 by its byte order mark,
    and else cp1252 if the text has no character of UTF-8. It also names the flag, unless ``given``
    is None, which stands for UTF-8.

    Raises:
        LookupError: Python has no such encoding of text.
    """

    def __init__(self, given: str | None):
        "".encode(given or "utf-8")  # refuses codecs that are not encodings of text
        self.name = codecs.lookup(given or "utf-8").name.upper().removesuffix("-SIG")
        self._has_flag = given is not None
        self._has_utf8 = False
        self.codec = "utf-8-sig" if self.name == "UTF-8" else self.name

    def problem_of_start(self, start: bytes) -> str | None:
        """Return why a source with these first bytes cannot be read, or None."""
        if self.name != "UTF-8":
            return None
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return self._problem("utf-16")
        return self._problem(None) if b"\0" in start else None

    def problem_of(self, text: str) -> str | None:
        """Return the problem of a text in which unpaired surrogates stand for bytes that cannot be
        decoded, or None.
        """
        if not has_surrogate(text):
            self._has_utf8 = self._has_utf8 or not text.isascii()
            return None
        # neither characters of UTF-8 nor control characters, as in binary files
        if self._has_utf8 or self.name != "UTF-8" or re.search("[^\t-\r -~\ud800-\udfff]", text):
            return self._problem(None)
        try:
            text.encode(errors="surrogateescape").decode("cp1252")
        except UnicodeDecodeError:
            return self._problem(None)
        return self._problem("cp1252")

    def _problem(self, fits: str | None) -> str:
        offer = f", or give --encoding {fits}" if fits and self._has_flag else ""
        return f"not {self.name} text{f' but fits {fits}' if fits else ''}: save it as UTF-8{offer}"


def has_surrogate(text: str) -> bool:
    """Return whether a text has an unpaired surrogate, which stands for a byte that is not
    UTF-8.
    """
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None
