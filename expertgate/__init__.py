"""An inference server for FlexOlmo in which every request consults exactly the experts it may."""

__version__ = "0.1.0"
