"""A small Llama trained on Python's standard library, shipped so that ``quantrature demo`` needs no download.

``model/`` is the model and its tokenizer in Hugging Face format, :mod:`quantrature.demo.text` finds the text
it is calibrated and measured on in the running Python installation, :mod:`quantrature.demo.train` is the script that
trained it, and :mod:`quantrature.demo.tour` what the verb does with it.
"""
