"""The words that fill templates: names, places, things, countries, nouns, parameters.

No word is in two lists that fill one template, so that a split can give each word to one half. Things begin with a
consonant, since templates write `a` before them.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    "Mary Anna Laura Sarah Emma Alice Julia Maria Lisa Susan Karen Linda Nancy Helen Rachel Rebecca Jessica Jennifer "
    "Michelle Amanda Nicole Kate Amy Emily Elizabeth Claire Diana Lucy Megan Sophie Olivia Hannah Catherine Margaret "
    "Ruth Jane Ellen Martha Stephanie Melissa Vanessa Tiffany Lily"
)
"""First names that are nearly always a woman's; none is a common word as well."""

MALE_NAMES = _words(
    "John James David Michael Robert Thomas Daniel Peter Paul George Richard Charles Joseph Steven Kevin Brian Andrew "
    "Matthew Simon Adam Eric Tom Ben Henry Edward Arthur Jason Ryan Justin Patrick Samuel Philip Jacob Nathan Oliver "
    "Kyle Aaron Sean Luke Victor Walter Gary Tim"
)
"""First names that are nearly always a man's; none is a common word as well."""

NAMES = tuple(name for pair in zip(FEMALE_NAMES, MALE_NAMES, strict=True) for name in pair)

PLACES = _words(
    "school store park office station hospital restaurant library market museum garden beach church farm theater "
    "bakery harbor hotel stadium lake castle zoo bank river"
)
"""Places that fit `at the …`."""

THINGS = _words(
    "ring book drink letter necklace ball phone ticket gift cake bottle hat lamp map camera basket pencil flower "
    "jacket bracelet sandwich cup key painting"
)
"""Things that people can give each other."""

PERIODS = _words(
    "war siege reign project voyage expedition campaign occupation famine drought plague truce alliance dispute feud "
    "rebellion strike construction journey conflict contract crisis partnership marriage career tour trial study "
    "regime blockade boom epidemic migration program protest quest renovation revolution struggle search"
)
"""Nouns for things that can last for years."""

PEOPLE = (
    ("author", "authors"), ("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"),
    ("manager", "managers"), ("student", "students"), ("lawyer", "lawyers"), ("writer", "writers"),
    ("driver", "drivers"), ("officer", "officers"), ("dancer", "dancers"), ("singer", "singers"),
    ("worker", "workers"), ("customer", "customers"), ("engineer", "engineers"), ("actor", "actors"),
    ("player", "players"), ("soldier", "soldiers"), ("friend", "friends"), ("visitor", "visitors"),
)  # fmt: skip
"""Nouns for people, singular and plural."""

OBJECTS = (
    ("picture", "pictures"), ("table", "tables"), ("window", "windows"), ("car", "cars"), ("house", "houses"),
    ("tree", "trees"), ("chair", "chairs"), ("computer", "computers"), ("door", "doors"), ("machine", "machines"),
    ("boat", "boats"), ("building", "buildings"), ("train", "trains"), ("bridge", "bridges"), ("horse", "horses"),
    ("bird", "birds"), ("desk", "desks"), ("plane", "planes"), ("tower", "towers"), ("truck", "trucks"),
)  # fmt: skip
"""Nouns for things that people can be near, singular and plural."""

LIKING = (
    ("likes", "like"),
    ("knows", "know"),
    ("sees", "see"),
    ("hears", "hear"),
    ("follows", "follow"),
)
"""Transitive verbs that fit people, singular and plural."""

BEING = ((" is", " are"), (" was", " were"), (" has", " have"))
"""Verbs that can follow a singular subject, and the same for a plural one."""

CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("England", "London"),
    ("Russia", "Moscow"), ("China", "Beijing"), ("Japan", "Tokyo"), ("Egypt", "Cairo"),
    ("Greece", "Athens"), ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Austria", "Vienna"),
    ("Hungary", "Budapest"), ("Sweden", "Stockholm"), ("Norway", "Oslo"), ("Finland", "Helsinki"),
    ("Denmark", "Copenhagen"), ("Ireland", "Dublin"), ("Scotland", "Edinburgh"), ("Belgium", "Brussels"),
    ("Turkey", "Ankara"), ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Syria", "Damascus"), ("Lebanon", "Beirut"),
    ("Jordan", "Amman"), ("Qatar", "Doha"), ("Kenya", "Nairobi"), ("Uganda", "Kampala"), ("Ghana", "Accra"),
    ("Nigeria", "Abuja"), ("Sudan", "Khartoum"), ("Libya", "Tripoli"),
    ("Morocco", "Rabat"), ("Canada", "Ottawa"), ("Australia", "Canberra"), ("Cuba", "Havana"), ("Peru", "Lima"),
    ("Chile", "Santiago"), ("Venezuela", "Caracas"), ("Colombia", "Bogota"),
    ("Romania", "Bucharest"), ("Bulgaria", "Sofia"), ("Serbia", "Belgrade"), ("Croatia", "Zagreb"),
    ("Thailand", "Bangkok"), ("Vietnam", "Hanoi"), ("Indonesia", "Jakarta"), ("Nepal", "Kathmandu"),
    ("Afghanistan", "Kabul"), ("Taiwan", "Taipei"),
)  # fmt: skip
"""Countries and their capitals, one word each; no capital contains its country's name, which would give it away."""

PARAMETERS = _words(
    "size name path mode color width height count label token value index table file host port user query model "
    "image shape scale score depth limit order point level state frame input output field group event buffer source "
    "target offset weight text rate date time space range speed angle node edge line page title option result "
    "message format filter number address"
)
"""Names of parameters in code."""

FUNCTIONS = _words(
    "load save open close read write send parse build check update create delete convert render connect "
    "start stop reset search sort merge split copy move print draw train test run"
)
"""Names of functions in code."""

DESCRIPTIONS = _words(
    "water garden market summer friend window river church morning letter kitchen island music winter forest "
    "street castle hunter silver village doctor mountain bridge winner story paper master sugar orange dinner "
    "horse kingdom captain season teacher shadow butter valley bottle cousin"
)
"""Words that give no hint of a parameter's name."""
