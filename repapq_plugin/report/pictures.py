"""Images as ``data:`` addresses, small enough for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from repapq_plugin.report.page import Figure

LONGEST_SIDE = 640
"""In pixels, of a picture in a page; larger ones are made smaller."""

QUALITY = 85
"""Of JPEG, for photographs; what is smaller without loss is kept so."""


def picture(image: NDArray[np.uint8], alt: str, caption: str = "", *, wide: bool = False) -> Figure:
    """Return an image as a figure.

    Args:
        image: ``(height, width, 3)``, red, green and blue.
        alt: What it shows.
        caption: Below it.
        wide: Whether it takes the whole width.
    """
    from PIL import Image

    made = Image.fromarray(np.ascontiguousarray(image))
    made.thumbnail((LONGEST_SIDE * (2 if wide else 1),) * 2)
    found: dict[str, bytes] = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": QUALITY})):
        stream = io.BytesIO()
        made.save(stream, kind, **options)
        found[kind] = stream.getvalue()
    kind = min(found, key=lambda each: len(found[each]))
    return Figure(f"data:image/{kind};base64,{base64.b64encode(found[kind]).decode()}", alt, caption, wide)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return the image that a figure is, ``(height, width, 3)``, red, green and blue; a drawing is none."""
    from PIL import Image

    data = base64.b64decode(figure.content.partition(",")[2])
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"), np.uint8)
