"""Has the owner of a web image asked that it be left out? Read from the metadata beside the image.

There is no field that all collections agree on, so the names in use are looked for, at the top of the metadata and
in objects in it (`headers`, say), without regard to case, and with `-` and `_` taken as the same:

- flags: `opt_out`, `opted_out`, `optout`, `opt_out_ai`, `noai`, `noimageai`, `noml`, `noindex`, `noimageindex`
  (the directives of X-Robots-Tag) and `tdm_reservation` (W3C TDM Reservation Protocol). They count when they are true,
  a number that is not 0, or a text other than "", "0", "false", "no", "none" and "null".
- directives: `x_robots_tag`, `robots`, `robots_tag`, a text or a list of texts with one of the directives `noai`,
  `noimageai`, `noml`, `noindex` or `noimageindex` among them, whichever crawler they are addressed to.

img2dataset itself keeps no images whose answer carried such a header, unless `--disallowed_header_directives '[]'`
told it to; metadata carries flags where the list of URLs had such a column, by `--save_additional_columns`.
"""

import re
from typing import Any

DIRECTIVES = {"noai", "noimageai", "noml", "noindex", "noimageindex"}
FLAGS = DIRECTIVES | {"opt_out", "opted_out", "optout", "opt_out_ai", "tdm_reservation"}
HEADERS = {"x_robots_tag", "robots", "robots_tag"}
_UNSET = {"", "0", "0.0", "false", "no", "none", "null", "nan"}


def opted_out(metadata: dict[str, Any]) -> str | None:
    """The field by which an image is opted out, "NAME=VALUE", or None."""
    inner = [field for value in metadata.values() if isinstance(value, dict) for field in value.items()]
    for key, value in [*metadata.items(), *inner]:
        name = key.lower().replace("-", "_")
        if (name in FLAGS and _is_set(value)) or (name in HEADERS and _forbids(value)):
            return f"{key}={value if isinstance(value, str | int | float) else '...'}"[:80]
    return None


def _is_set(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _UNSET
    return bool(value) and value == value  # noqa: PLR0124 (NaN is how tables say nothing)


def _forbids(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    words = {word for text in texts if isinstance(text, str) for word in re.split(r"[\s,:;]+", text.lower())}
    return bool(words & DIRECTIVES)
