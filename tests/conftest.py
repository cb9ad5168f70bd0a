"""What holds for all tests."""

import numpy as np
import pytest
from hypothesis import settings

# Time belongs to benchmarks: a machine with other work must not fail a test.
settings.register_profile("wavg", deadline=None, max_examples=50)
settings.load_profile("wavg")


@pytest.fixture
def no_alarms():
    """Let infinities and NaN come and go without NumPy's warnings."""
    with np.errstate(all="ignore"):
        yield
