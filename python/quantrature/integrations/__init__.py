"""quantrature inside other packages: transformers and PEFT."""
