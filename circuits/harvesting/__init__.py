"""One pass of a model over a dataset into an activation store."""

from circuits.harvesting.running import find_stores, harvest, unusable_stores

__all__ = ["find_stores", "harvest", "unusable_stores"]
