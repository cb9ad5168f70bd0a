"""The version, where both the package's metadata and the files it writes take it from."""

__all__ = ["__version__"]

__version__ = "0.1.0"
