"""Models from transformers: loading them, and finding the weight matrices in them."""

from .lazy_weight import LazyWeight
from .linears import Linears, LinearWeight, Skipped, check_loaded, find_linears, small_embedding
from .loading import load_config, load_model, load_tokenizer

__all__ = [
    "LazyWeight",
    "LinearWeight",
    "Linears",
    "Skipped",
    "check_loaded",
    "find_linears",
    "load_config",
    "load_model",
    "load_tokenizer",
    "small_embedding",
]
