"""Say why bytes are not text of an encoding, and offer one that fits."""

import codecs
import re

# the first four bytes of text in a wide encoding: a byte order mark, or the zero bytes of an ASCII character
WIDE = {
    b"\xff\xfe\0\0|\0\0\xfe\xff": "utf-32",
    b"\xff\xfe|\xfe\xff": "utf-16",
    b"[^\0]\0\0\0": "utf-32-le",
    b"\0\0\0[^\0]": "utf-32-be",
    b"[^\0]\0[^\0]\0": "utf-16-le",
    b"\0[^\0]\0[^\0]": "utf-16-be",
}


class Encoding:
    """The encoding of a source of text, and why a part of the source is not text of this encoding.

    A problem offers an encoding that fits, as far as can be told: UTF-16 and UTF-32 by their first bytes, and else cp1252 if
    the text has no character of UTF-8. It also names the flag, unless ``given`` is None, which stands for UTF-8.

    Raises:
        LookupError: Python has no such encoding of text.
    """

    def __init__(self, given: str | None):
        try:
            "".encode(given or "utf-8")  # refuses codecs that are not encodings of text
        except ValueError as error:  # a zero byte in the name
            raise LookupError(given) from error
        self.name = codecs.lookup(given or "utf-8").name.upper().removesuffix("-SIG")
        self._has_flag, self._has_utf8 = given is not None, False
        self.codec = "utf-8-sig" if self.name == "UTF-8" else self.name

    def decode(self, content: bytes) -> tuple[str, str | None]:
        """Return a whole text, and its problem or None."""
        try:
            text = content.decode(self.codec, "surrogateescape")
        except UnicodeError:  # of a wide encoding
            return "", self._problem(None)
        return text, self.problem_of_start(content[:4]) or self.problem_of(text)

    def problem_of_start(self, start: bytes) -> str | None:
        """Return why a source with these first four bytes cannot be read, or None."""
        wide = next((name for mark, name in WIDE.items() if re.match(mark, start, re.DOTALL)), None)
        return self._problem(wide) if self.name == "UTF-8" and (wide or b"\0" in start) else None

    def problem_of(self, text: str) -> str | None:
        """Return the problem of a text in which unpaired surrogates stand for bytes that cannot be decoded, or None."""
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
    """Return whether a text has an unpaired surrogate, which stands for a byte that is not UTF-8."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None
