"""The version of this library, which checkpoints record."""

__version__ = "0.1.0"
