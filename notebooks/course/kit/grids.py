"""What a SliderPlot shows at every setting, kept for the web pages, where no kernel draws it.

A file a plot, outputs/grids/KEY.json; the key is the hash of its film strip, which stands in the
notebook. Settings are those of `SliderPlot.grid`: the last control changes fastest.
"""
import base64
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from qlora_lib.base.files import read_json, write_json_atomic
from qlora_lib.base.paths import ROOT

from . import OUTPUTS_VARIABLE


def keep(strip: bytes, controls: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """Write what a page needs: `controls` as it makes them, and the PNG of each setting, those
    that several settings share once."""
    different = list(dict.fromkeys(pictures))
    write_json_atomic(_file(strip), {
        "controls": controls,
        "pictures": [base64.b64encode(png).decode() for png in different],
        "shown": [different.index(png) for png in pictures],
    })


def kept(strip: bytes) -> dict[str, Any] | None:
    """What `keep` has kept of the plot with this film strip, or None."""
    return read_json(_file(strip)) if _file(strip).is_file() else None


def _file(strip: bytes) -> Path:
    folder = Path(os.environ.get(OUTPUTS_VARIABLE) or ROOT / "outputs")
    return folder / "grids" / f"{hashlib.sha256(strip).hexdigest()[:20]}.json"


def address(png: bytes) -> str:
    """A picture as an address that holds it: as WebP, without loss, where that is smaller."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "WEBP", lossless=True, method=1)
    webp = buffer.getvalue()
    kind, data = ("webp", webp) if len(webp) < len(png) else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
