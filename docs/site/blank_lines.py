"""An extension of griffe for the site: our docstrings have no blank lines between sections (Args, Returns, Cost)."""

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Raises|Cost|Source):)")


class BlankLines(Extension):
    """Put a blank line before each section, which griffe's reader of Google's style needs."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change an object's docstring, once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
