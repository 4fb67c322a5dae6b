"""One pass of a model over a dataset into an activation store (layer 4)."""

from circuits.harvesting.running import find_stores, harvest, unusable_stores

__all__ = ["find_stores", "harvest", "unusable_stores"]
