"""Inputs: drawings, photographs, folders of images, texts, arrays, and datasets of other libraries."""

from circuits.stimuli.datasets import from_dataset
from circuits.stimuli.images import ImageSource, read_image
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource

__all__ = [
    "ImageSource",
    "TextSource",
    "from_dataset",
    "open_source",
    "read_image",
    "read_labels",
]
