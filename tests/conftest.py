"""What holds for all tests."""

from hypothesis import settings

# Time belongs to benchmarks: a machine with other work must not fail a test.
settings.register_profile("wavg", deadline=None)
settings.load_profile("wavg")
