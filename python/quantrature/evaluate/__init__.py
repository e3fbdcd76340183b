"""Measures of a language model: perplexity, and divergence from a reference."""

from ._divergence import DivergenceResult, divergence
from ._perplexity import PerplexityResult, perplexity

__all__ = ["DivergenceResult", "PerplexityResult", "divergence", "perplexity"]
