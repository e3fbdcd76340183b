"""Integrations of quantrature into transformers and PEFT."""
