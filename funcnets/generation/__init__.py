"""Text from a function that gives logits: pure functions of a key, with or without a cache."""

from funcnets.generation.beam import Beams, beam_search
from funcnets.generation.choice import keep_nucleus, keep_top_k, penalize_repetition, sample
from funcnets.generation.generate import Generated, generate, greedy

__all__ = [
    "Beams",
    "Generated",
    "beam_search",
    "generate",
    "greedy",
    "keep_nucleus",
    "keep_top_k",
    "penalize_repetition",
    "sample",
]
