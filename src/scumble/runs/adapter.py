"""The section [adapter]: the settings of the family that it names, with the layers to change.

Every family in the registry is an alternative of its own: its settings class decides which options there are,
and an option of another family is refused.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BeforeValidator, Field, create_model

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.families import FAMILIES
from scumble.settings import Settings

DEFAULT_FAMILY = "lora"
"""The family where none is named."""


class Targeted(Settings):
    """The layers that an adapter changes."""

    targets: str | tuple[str, ...] = "attention"
    """Layers to adapt: attention, attention+mlp, all-linear, conv, attention+conv, or patterns such as
    "*.attn2.to_k"."""


def _with_targets(family: str) -> Any:
    """The settings of a family and its targets, as one section."""
    settings = FAMILIES.get(family).settings
    return create_model(
        f"{settings.__name__.removesuffix('Settings')}Section",
        __base__=(Targeted, settings),
        __module__=__name__,
        __doc__=settings.__doc__,
        # its fields have their docstrings from their own classes; a class without source is searched for in vain
        __cls_kwargs__={"use_attribute_docstrings": False},
    )


def _named(given: Any) -> Any:
    """`given` with its family, so that the alternative can be chosen; a family's own settings as a section."""
    if isinstance(given, DeltaSettings) and not isinstance(given, Targeted):
        given = {name: getattr(given, name) for name in given.model_fields_set} | {"family": given.family}
    return {"family": DEFAULT_FAMILY, **given} if isinstance(given, dict) else given


_SECTIONS: dict[str, Any] = {name: _with_targets(name) for name in (DEFAULT_FAMILY, *FAMILIES)}
"""Family -> its section; the default first, as the one that `scumble config new` describes."""

if TYPE_CHECKING:

    class AdapterSettings(DeltaSettings, Targeted):
        """What is trained: the adapter's family and size, and the layers it changes."""

else:
    AdapterSettings = Annotated[
        reduce(or_, _SECTIONS.values()), Field(discriminator="family"), BeforeValidator(_named)
    ]


def default_adapter() -> AdapterSettings:
    """The section where nothing is said."""
    return cast(AdapterSettings, _SECTIONS[DEFAULT_FAMILY]())
