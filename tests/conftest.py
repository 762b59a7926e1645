"""What holds for all tests."""

import pytest
from hypothesis import settings

# A slow machine is no defect: speed is measured in benchmarks.
settings.register_profile("mla-tools", deadline=None)
settings.load_profile("mla-tools")

# Each conversion in a process leaves threads of MLX behind and makes the next one slower: what converts most
# comes first.
FIRST = ("test_power_cut.py", "test_journal.py", "test_output.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests that convert most to the front."""
    items.sort(key=lambda item: item.path.name not in FIRST)
