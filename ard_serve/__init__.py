"""ard-serve: stretch a language model's context window, repair it, serve it and measure it."""

__version__ = "0.1.0"
