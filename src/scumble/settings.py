"""Settings: the base of every settings section, strict and frozen.

A setting is written once, beside the component that it sets: its docstring is the `--help`, the comment in
`scumble config new`, the description in the JSON schema and the reference page.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen section of settings: unknown keys, infinity and nan are refused, field docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
