"""What a row's value is known by in a history."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def value_digest(attributes: Mapping[str, Any]) -> str:
    """Digest of a row's attributes: absent and null are the same, and so are 1 and 1.0 (a column decides which)."""
    plain = {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in attributes.items()
        if name not in ("id", "vector") and value is not None and value == value
    }
    text = json.dumps(plain, sort_keys=True, default=lambda scalar: scalar.item())
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
