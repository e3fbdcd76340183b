"""Measures of a language model: perplexity, divergence from a reference, and tasks."""

from ._divergence import DivergenceResult, divergence
from ._perplexity import PerplexityResult, perplexity
from ._tasks import TaskResult, tasks

__all__ = ["DivergenceResult", "PerplexityResult", "TaskResult", "divergence", "perplexity", "tasks"]
