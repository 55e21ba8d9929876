"""The pronoun that refers to a name: "So Maria is a really great friend, isn't" -> " she".

The task is that of Mathwin et al. 2023 ("Identifying a preliminary circuit for predicting gendered pronouns in GPT-2
small") with several frames in place of one; frames and names are our own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle

from vesalius.data.tasks.base import (
    SPLITS,
    BalancedSampler,
    HasTokenizer,
    Row,
    build_pairs,
    check_request,
    shuffled,
    single_tokens,
    tokenizer_of,
    words,
)
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

CORRUPTIONS = ("name",)
LEAST_NAMES = 8
PRONOUNS = {"female": "she", "male": "he"}

FRAMES: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "Well, {name} is such a patient teacher, isn't",
        "I think {name} was the best player on the field, wasn't",
        "You know, {name} has a wonderful voice, doesn't",
        "Yes, {name} can run faster than anyone here, can't",
        "By now {name} should have finished the exam, shouldn't",
        "They said that {name} would arrive before noon, but nobody knew where",
        "After a long day at the office, {name} was so tired that",
        "When {name} woke up this morning,",
        "The neighbors like {name} very much because",
        "We asked {name} about the accident, and",
        "As a child, {name} dreamed of the sea, and later",
        "It surprised me that {name} left the party before",
    ),
    "validation": (
        "So {name} is really good at cooking, isn't",
        "In the end {name} did tell us the truth, didn't",
        "Of course {name} will be there tonight, won't",
        "Until last year {name} had never seen snow, had",
        "Surely {name} could help us with the garden, couldn't",
        "The doctor told {name} to rest until",
        "Although {name} had studied all night,",
        "Last week {name} lost the keys, so",
        "No one believed {name} at first, but",
        "While {name} was walking home in the rain,",
        "The train left without {name}, and now",
        "Years later {name} still remembered the house where",
    ),
}
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "discovery": {
        "female": words("Anna Laura Alice Julia Sarah Clara Diana Maria Helen Lucy Ruth Eva Amy Sophie Rebecca"),
        "male": words("Paul Peter David Robert Thomas Daniel Oscar Henry Victor Martin Simon Arthur Walter Jack Kevin"),
    },
    "validation": {
        "female": words(
            "Mary Kate Susan Linda Karen Jane Rachel Lisa Nancy Emma Catherine Sandra Emily Jessica Martha"
        ),
        "male": words(
            "John Michael James William Richard Joseph Charles Steven Andrew George Philip Eric Harry Patrick Carl"
        ),
    },
}


def gendered_pronoun(
    model: HasTokenizer, n: int = 32, seed: int = 0, corruption: str = "name", bos: str = "auto"
) -> Pairs:
    """n pairs in each of the splits "discovery" and "validation", which share no frame and no name.

    The corrupted prompt has a name of the other gender in the same place; answers are " she" and " he", equally often.
    groups: "template" (the frame), "names" (the clean prompt's name), "gender".

    Raises InputError for an n that cannot be made, TokenizerError for a tokenizer with too few single-token names.
    """
    tokenizer = tokenizer_of(model)
    names = {
        split: {g: single_tokens(tokenizer, NAMES[split][g], LEAST_NAMES, f"{g} names") for g in PRONOUNS}
        for split in SPLITS
    }
    maximum = min(2 * len(FRAMES[s]) * min(len(names[s][g]) for g in PRONOUNS) for s in SPLITS)
    check_request(n, maximum, "gendered_pronoun", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, names[split], n, seed)]
    return build_pairs(rows, tokenizer, bos=bos, corruption=corruption, task="gendered_pronoun")


def _rows(split: str, names: Mapping[str, Sequence[str]], n: int, seed: int) -> list[Row]:
    draw = generator_for("gendered_pronoun", split, seed)
    frames = shuffled(FRAMES[split], draw)
    clean, corrupted = ({g: BalancedSampler(names[g], draw) for g in PRONOUNS} for _ in range(2))
    seen: defaultdict[str, set[str]] = defaultdict(set)
    rows = []
    for row, frame in zip(range(n), cycle(frames), strict=False):
        # Neighbouring frames start with different genders, so that genders balance over frames as well as within them.
        gender, other = [("female", "male"), ("male", "female")][(row // len(frames) + row % len(frames)) % 2]
        name = clean[gender].draw(exclude=seen[frame])
        seen[frame].add(name)
        rows.append(
            Row(
                clean=frame.format(name=name),
                corrupted=frame.format(name=corrupted[other].draw()),
                answer=f" {PRONOUNS[gender]}",
                distractor=f" {PRONOUNS[other]}",
                groups={"template": frame, "names": name, "gender": gender},
                split=split,
                edits=1,
            )
        )
    return rows
