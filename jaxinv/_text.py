"""Names that come from elsewhere, made harmless where they are shown.

A parameter, a file or a column of a table may be called anything: escape sequences that repaint the
terminal, marks that turn the direction of writing, halves of characters that no encoding can write.
"""

from __future__ import annotations

import json
import re

# Control characters, direction marks, line separators, lone surrogates, the byte order mark.
_UNSEEN = "\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
_HARMFUL = re.compile(f"[{_UNSEEN}]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that is not to be seen written as its escape sequence.

    Args:
        text: any text.
        keep: characters that are left as they are, such as the line breaks of a message.

    Example:
        >>> from jaxinv._text import printable
        >>> print(printable("a\x1b[31mb \ud800 λ → \u202e"))
        a\x1b[31mb \ud800 λ → \u202e
    """

    def escaped(found: re.Match[str]) -> str:
        character = found[0]
        return character if character in keep else character.encode("unicode_escape").decode()

    return _HARMFUL.sub(escaped, text)


def printable_json(text: str) -> str:
    r"""JSON that means the same and can be written in UTF-8, and shown.

    Example:
        >>> import json
        >>> from jaxinv._text import printable_json
        >>> text = printable_json(json.dumps({"λ": "\x9b \ud800"}, ensure_ascii=False))
        >>> print(text, json.loads(text) == {"λ": "\x9b \ud800"})
        {"λ": "\u009b \ud800"} True
    """

    def escaped(found: re.Match[str]) -> str:
        # Outside of its texts JSON has no such characters but line breaks, which stay.
        return found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1]

    return _HARMFUL.sub(escaped, text)
