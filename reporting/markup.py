# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG, in which every text is escaped, for here alone are tags and attributes written.

In: texts and numbers from anywhere, among them names of folders. Out: `Markup`.
"""

import html
from typing import Any


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """A value as text; control characters and broken encodings are shown as codes."""
    if isinstance(value, Markup):
        return value
    seen = (c if c.isprintable() or c in '\n\t' else repr(c)[1:-1] for c in str(value))
    return Markup(html.escape(''.join(seen)))


def join(parts: Any) -> Markup:
    """The parts, escaped, one after the other."""
    return Markup(''.join(map(escape, parts)))


def opening(tag: str, /, **attributes: Any) -> Markup:
    """A start tag; `aria_label` becomes aria-label, and `class_` class."""
    shown = ''.join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    return Markup(f'<{tag}{shown}>')


def element(tag: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element around texts, which are escaped, and `Markup`, which is not."""
    return Markup(f'{opening(tag, **attributes)}{join(content)}</{tag}>')
