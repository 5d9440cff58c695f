"""Settings of the whole suite: the Hypothesis profile, and signatures checked at run time."""

import os
from pathlib import Path

import hypothesis

# Dynamo cannot trace checked functions: tests marked `dynamo` run in a process of their own,
# started by tests/test_dynamo.py, with the checks off.
UNCHECKED = os.environ.get("FUNCNETS_UNCHECKED") == "1"
if not UNCHECKED:
    from jaxtyping import install_import_hook

    # All modules but what flattens trees, which is called at every turn and takes anything, and
    # what tests models, whose functions are made anew for every case.
    package = Path(__file__).parents[1] / "funcnets"
    modules = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "testing" not in path.parts
    ]
    modules.remove("funcnets.tree.flatten")
    # Which copies the functions that it makes, and so would copy the check without their arguments.
    modules.remove("funcnets.model")
    install_import_hook(modules, "beartype.beartype")

pytest_plugins = ["pytester"]

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The suite's own, and one for a long look: pytest --hypothesis-profile=thorough
hypothesis.settings.register_profile(
    "ci", max_examples=10, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker a core: threads of two would wait for each other


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the largest networks' derivatives, too")


def pytest_collection_modifyitems(config, items):
    """Each test runs in one of the two processes; the other leaves it out without a word."""
    wanted = [(item.get_closest_marker("dynamo") is not None) == UNCHECKED for item in items]
    left_out = [item for item, want in zip(items, wanted, strict=True) if not want]
    items[:] = [item for item, want in zip(items, wanted, strict=True) if want]
    # The longest first, or one worker would be left alone with it at the end.
    items.sort(key=lambda item: item.path.name != "test_dynamo.py")
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """References that draw from the global generator are the same in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _global_generator_untouched():
    """No test may find that the library read or advanced torch's global generator."""
    before = torch.get_rng_state()
    yield
    # Tests that build torch.nn references draw from it themselves, inside torch.random.fork_rng.
    assert torch.equal(before, torch.get_rng_state()), "the global generator was advanced"


@pytest.fixture
def unchecked():
    """Signatures unchecked, as for a user: an argument of a wrong type meets our own errors."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
