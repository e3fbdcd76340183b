"""Evaluate a language model: perplexity, KL divergence from a reference model, and benchmark tasks."""

from ._divergence import DivergenceResult, divergence
from ._perplexity import PerplexityResult, perplexity
from ._tasks import TaskResult, tasks

__all__ = ["DivergenceResult", "PerplexityResult", "TaskResult", "divergence", "perplexity", "tasks"]
