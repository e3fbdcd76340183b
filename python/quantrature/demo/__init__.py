"""A small Llama trained on Python's standard library, shipped so that ``quantrature demo`` needs no download.

``model/`` is the model and its tokenizer in Hugging Face format. :mod:`quantrature.demo.text` finds the calibration and
evaluation text in the running Python installation. :mod:`quantrature.demo.train` is the script that trained the model,
and :mod:`quantrature.demo.tour` is what ``quantrature demo`` runs.
"""
