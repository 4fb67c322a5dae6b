"""Behaviours of language models as text templates that are filled for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from circuits.tasks.generated import Generated
from circuits.tasks.templates.agreement import subject_verb_agreement
from circuits.tasks.templates.capitals import capital_country
from circuits.tasks.templates.docstrings import docstring
from circuits.tasks.templates.indirect_objects import indirect_object
from circuits.tasks.templates.pronouns import gendered_pronouns
from circuits.tasks.templates.tokenizers import Tokenizer
from circuits.tasks.templates.years import greater_than

TEMPLATES: Mapping[str, Callable[..., Generated]] = {
    "indirect-object": indirect_object,
    "greater-than": greater_than,
    "docstring": docstring,
    "agreement": subject_verb_agreement,
    "pronouns": gendered_pronouns,
    "capitals": capital_country,
}
"""Generators of text items by the behaviour's name; each takes the number of items, a seed and a model's tokenizer."""

ALIASES: Mapping[str, str] = {"ioi": "indirect-object"}
"""Other names of behaviours, as the literature calls them."""

__all__ = [
    "ALIASES",
    "TEMPLATES",
    "Tokenizer",
    "capital_country",
    "docstring",
    "gendered_pronouns",
    "greater_than",
    "indirect_object",
    "subject_verb_agreement",
]
