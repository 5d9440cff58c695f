import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Signatures unchecked, as for a user: an argument of a wrong type meets our own errors."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
