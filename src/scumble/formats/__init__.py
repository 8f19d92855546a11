"""Formats: adapter files in every dialect, to and from AdapterState. Pure functions, no model in memory."""

from scumble.formats.codec import CODECS, Codec, Read, detect, read, write
from scumble.formats.container import WEIGHTS_NAME, TensorFile
from scumble.formats.inspection import Inspection, inspect
from scumble.formats.pairs import Decoded

__all__ = [
    "CODECS",
    "WEIGHTS_NAME",
    "Codec",
    "Decoded",
    "Inspection",
    "Read",
    "TensorFile",
    "detect",
    "inspect",
    "read",
    "write",
]
