"""decode: the text of a caption file, whatever the editor that wrote it."""

from __future__ import annotations

import codecs

from scumble.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before utf-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes) -> tuple[str, str]:
    """(text, encoding) of bytes in UTF-8 (with or without BOM), UTF-16, UTF-32, or else Windows' cp1252.

    Raises:
        DataError: the bytes are no text in any of them.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strict(data, encoding), encoding
    if b"\x00" in data:  # UTF-16 without its mark: Western text has a zero in every other byte
        encoding = "utf-16-le" if data[1::2].count(0) >= data[0::2].count(0) else "utf-16-be"
        return _strict(data, encoding), encoding
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return _strict(data, "cp1252"), "cp1252"


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"is no text: byte 0x{data[error.start]:02x} at {error.start} is neither UTF-8 nor {encoding}. "
            "Save it as UTF-8."
        ) from error
