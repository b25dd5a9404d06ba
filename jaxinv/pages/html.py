"""Content, style and script put together into one HTML file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jaxinv._text import printable, printable_json


def render(title: str, content: Mapping[str, Any]) -> str:
    """One HTML page that draws `content`, and asks nothing of any network.

    Args:
        title: the heading; any text.
        content: plain values without NaN and infinities, as `jaxinv.pages.describe` returns them.
            They are in the page as JSON, and all that is shown is drawn from there.

    Returns:
        The page.

    Raises:
        ValueError: for numbers that JSON does not have.

    Example:
        >>> from jaxinv.pages import render
        >>> "<script>" in render("page", {"kind": "model", "name": "</script><script>"})[-200:]
        False
    """
    text = json.dumps(
        {"title": title, **content}, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    text = printable_json(text)
    # A name must not end the element that holds it, nor open a comment.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "TITLE": html.escape(printable(title)),
        "STYLE": _file("page.css"),
        "SCRIPT": "\n".join(_file(name) for name in ("charts.js", "picture.js", "page.js")),
        "DATA": text,
    }
    return re.sub("@@([A-Z]+)@@", lambda found: parts[found[1]], _file("page.html"))


def _file(name: str) -> str:
    return (resources.files("jaxinv.pages") / name).read_text(encoding="utf-8")
