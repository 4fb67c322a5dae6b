"""Activation stores: a model's activations on a dataset, on disk."""

from circuits.store.provenance import Provenance, StaleCacheError
from circuits.store.reading import ActivationStore, Example, UnitStatistics
from circuits.store.rows import Rows
from circuits.store.spectra import Spectrum, spectrum
from circuits.store.summaries import BINS, Summary, TailFit, fit_tail

__all__ = [
    "BINS",
    "ActivationStore",
    "Example",
    "Provenance",
    "Rows",
    "Spectrum",
    "StaleCacheError",
    "Summary",
    "TailFit",
    "UnitStatistics",
    "fit_tail",
    "spectrum",
]
