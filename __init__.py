"""mskip: Transformer language models that skip the attention they do not need."""

__version__ = "0.1.0"
