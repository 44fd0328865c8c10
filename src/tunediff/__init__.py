"""tunediff finds what fine-tuning changed inside a model, proves it by intervening, and undoes it."""

__version__ = "0.1.0"
