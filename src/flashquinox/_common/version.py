"""The version of this library, which checkpoints and files name."""

__version__ = "0.1.0"
