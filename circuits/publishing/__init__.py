"""A static site of chosen units, circuits and cases: files only, without a server."""

from circuits.publishing.writing import Chosen, Published, publish

__all__ = ["Chosen", "Published", "publish"]
