"""Sparse autoencoders as modules and as files."""

from circuits.autoencoders.autoencoder import About, Activation, Autoencoder
from circuits.autoencoders.files import FILE, load_autoencoder, save_autoencoder
from circuits.autoencoders.sparse import Code

__all__ = [
    "FILE",
    "About",
    "Activation",
    "Autoencoder",
    "Code",
    "load_autoencoder",
    "save_autoencoder",
]
