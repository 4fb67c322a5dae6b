"""Concepts of units: names with their evidence, masks, probes, and classifiers made of named concepts."""

from circuits.concepts.basis import BasisTest, basis_test
from circuits.concepts.bottleneck import (
    Bottleneck,
    Intervention,
    as_recipe,
    intervene,
    suspects,
    train_bottleneck,
)
from circuits.concepts.dissection import Dissection, dissect
from circuits.concepts.names_files import (
    NamesFile,
    import_names,
    read_names,
    shipped_names,
    write_names,
)
from circuits.concepts.naming import (
    Name,
    Naming,
    damaged_names,
    history,
    name_by_attributes,
    name_by_text,
    name_unit,
    names_of,
    save_names,
)
from circuits.concepts.pooling import pooled
from circuits.concepts.probes import Probe, probe

__all__ = [
    "BasisTest",
    "Bottleneck",
    "Dissection",
    "Intervention",
    "Name",
    "NamesFile",
    "Naming",
    "Probe",
    "as_recipe",
    "basis_test",
    "damaged_names",
    "dissect",
    "history",
    "import_names",
    "intervene",
    "name_by_attributes",
    "name_by_text",
    "name_unit",
    "names_of",
    "pooled",
    "probe",
    "read_names",
    "save_names",
    "shipped_names",
    "suspects",
    "train_bottleneck",
    "write_names",
]
