"""The type checker that the whole suite runs under: an int is welcome where a float is."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
