"""Provenance: the base that an adapter was trained on, compared with the base that it is used with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scumble.adapters.state import Metadata
from scumble.errors import WrongBase
from scumble.models import FAMILIES

Kinship = Literal["exact", "same family", "unknown"]
"""exact: the very same weights. same family: other weights of the same architecture. unknown: the file does not
say, or this base's weights can't be compared. A wrong family has no word: it is refused."""


@dataclass(frozen=True)
class Used:
    """A base as far as it is known where an adapter is put into it. Empty strings mean "not known"."""

    name: str = ""
    family: str = ""
    """"sd1", "sd2", ..."""
    fingerprint: str = ""
    why: str = ""
    """Why there is no fingerprint, as the end of a sentence."""


@dataclass(frozen=True)
class Match:
    """What the comparison says."""

    kinship: Kinship
    note: str = ""
    """What a person should know, as a sentence; empty where there is nothing to say."""


def compare(said: Metadata, used: Used) -> Match:
    """Compare what a file says of its base with the base that it is used with, by fingerprint and family.

    Raises:
        WrongBase: they are of two families.
    """
    trained = said.base_name[:80] or "another base"
    loaded = used.name[:80] or "this base"
    known = said.base_family in FAMILIES and used.family in FAMILIES  # other tools have words of their own
    if known and said.base_family != used.family:
        raise WrongBase(
            f"It was trained on {trained} ({said.base_family}); {loaded} is of another family "
            f"({used.family}). Not applied. Use it with a base of the family {said.base_family}."
        )
    if not said.base_fingerprint:
        return Match("unknown")
    if not used.fingerprint:
        why = f": {used.why}" if used.why else ""
        return Match(
            "unknown",
            f"It was trained on {trained} (weights {said.base_fingerprint[:12]}). Whether {loaded} has these "
            f"weights can't be told{why}.",
        )
    if used.fingerprint == said.base_fingerprint:
        return Match("exact")
    same = f" of the same family ({used.family})" if known else ""
    return Match(
        "same family",
        f"It was trained on {trained} (weights {said.base_fingerprint[:12]}), and is loaded on {loaded}{same}, "
        f"which has other weights ({used.fingerprint[:12]}). It may act differently.",
    )
