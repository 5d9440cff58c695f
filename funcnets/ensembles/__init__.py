"""Ensembles: what their members say together, which of them to take, and how to find them.

An ensemble is any function of one network under `torch.func.vmap`, and so is its training; there is
nothing to wrap. Here is what comes after, and population search.
"""

from funcnets.ensembles.chunks import chunked, members
from funcnets.ensembles.predictions import (
    disagreement,
    entropy,
    expected_entropy,
    mean,
    mutual_information,
    variance,
)
from funcnets.ensembles.search import Found, search
from funcnets.ensembles.selection import Selection, greedy_selection, log_likelihood
from funcnets.ensembles.soup import Soup, greedy_soup, refresh_buffers, uniform_soup
from funcnets.ensembles.spaces import Choice, LogUniform, Space, Uniform, draw, grid
from funcnets.ensembles.temperature import fit_temperature

__all__ = [
    "Choice",
    "Found",
    "LogUniform",
    "Selection",
    "Soup",
    "Space",
    "Uniform",
    "chunked",
    "disagreement",
    "draw",
    "entropy",
    "expected_entropy",
    "fit_temperature",
    "greedy_selection",
    "greedy_soup",
    "grid",
    "log_likelihood",
    "mean",
    "members",
    "mutual_information",
    "refresh_buffers",
    "search",
    "uniform_soup",
    "variance",
]
