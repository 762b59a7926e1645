"""What holds for all tests."""

from hypothesis import settings

# A slow machine is no defect: speed is measured in benchmarks.
settings.register_profile("mla-tools", deadline=None)
settings.load_profile("mla-tools")
