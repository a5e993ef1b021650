"""The version of this library, which checkpoints record."""

__version__ = "0.2.0"
