"""The order of all tests."""

from __future__ import annotations

import pytest

from tests.weight import longest_first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of minutes begin. Workers keep this order with `--no-loadscope-reorder` alone."""
    items.sort(key=lambda item: longest_first(str(item.path)))
