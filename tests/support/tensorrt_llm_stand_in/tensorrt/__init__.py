"""STAND-IN of `tensorrt`: its version."""

__version__ = "10.14.1"
