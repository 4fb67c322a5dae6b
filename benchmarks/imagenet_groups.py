"""What kind of thing each ImageNet class is, for naming units: groups of neighbouring class numbers.

The 1000 classes of ILSVRC 2012 are numbered along WordNet's tree, so animals of a kind have neighbouring numbers
(Russakovsky et al. 2015). `python benchmarks/imagenet_groups.py LABELS.json OUT.json` writes the attributes of each
image of a labels file, as `circuits sae name --attributes` reads them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GROUPS = {
    "fish": [(0, 6), (389, 397)], "bird": [(7, 24), (80, 100), (127, 146)], "songbird": [(10, 20)],
    "amphibian": [(25, 32)], "turtle": [(33, 37)], "lizard": [(38, 48)], "snake": [(52, 68)],
    "reptile": [(33, 68)], "spider or scorpion": [(70, 78)], "crustacean": [(118, 126)], "water bird": [(127, 146)],
    "sea mammal": [(147, 150)], "dog": [(151, 268)], "terrier": [(179, 203)], "hound": [(159, 178)],
    "wild dog": [(269, 280)], "cat": [(281, 293)], "bear": [(294, 297)], "insect": [(300, 326)],
    "beetle": [(300, 307)], "butterfly": [(321, 326)], "rabbit or rodent": [(330, 338)], "hoofed animal": [(339, 355)],
    "monkey or ape": [(365, 384)], "animal": [(0, 397)], "mammal": [(102, 106), (147, 299), (330, 388)],
    "furry four-legged animal": [(151, 299), (330, 338), (356, 364)], "thing": [(398, 922)],
    "food": [(923, 969)], "fruit or vegetable": [(936, 957)], "landscape": [(970, 980)],
    "flower or fungus": [(984, 997)],
}  # fmt: skip
"""First and last numbers of the classes in each group."""


def groups_of(label: int) -> list[str]:
    """The groups that a class is in.

    >>> groups_of(151)
    ['dog', 'animal', 'mammal', 'furry four-legged animal']
    """
    return [name for name, spans in GROUPS.items() if any(a <= label <= b for a, b in spans)]


def main() -> None:
    """Write the attributes of each image of a labels file."""
    labels = json.loads(Path(sys.argv[1]).read_text())["labels"]
    Path(sys.argv[2]).write_text(
        json.dumps({name: groups_of(label) for name, label in labels.items()}, indent=1)
    )


if __name__ == "__main__":
    main()
