"""The base of all parts of a request: strict types, no NaN, unknown keys passed over."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_ITEMS = 4096
"""Of messages, parts and token lists: no context holds more that means something."""


class StrictModel(BaseModel):
    """What all parts of a request share."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=())
