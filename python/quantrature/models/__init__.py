"""transformers models: load them, find their weight matrices, run them block by block, compute gradients."""

from .lazy_weight import LazyWeight
from .linears import Linears, LinearWeight, Skipped, check_dense, check_loaded, find_linears, small_embedding
from .loading import empty_model, load_config, load_model, load_tokenizer
from .processor import processor_files

__all__ = [
    "LazyWeight",
    "LinearWeight",
    "Linears",
    "Skipped",
    "check_dense",
    "check_loaded",
    "empty_model",
    "find_linears",
    "load_config",
    "load_model",
    "load_tokenizer",
    "processor_files",
    "small_embedding",
]
