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
    shuffled,
    single_tokens,
    split_sizes,
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
        "As far as I know, {name} has never been abroad, has",
        "To be honest, {name} could have tried harder, couldn't",
        "At the time {name} was living in a small flat, wasn't",
        "In my opinion {name} does too much at once, doesn't",
        "Next month {name} will start a new job, won't",
        "Apparently {name} would rather stay at home, wouldn't",
        "Everyone knows that {name} can swim, so of course",
        "The police questioned {name} twice, but each time",
        "If {name} had known about the storm,",
        "Before {name} could open the door,",
        "Once {name} had paid the bill,",
        "Because {name} was the youngest in the family,",
        "Since {name} moved to the city,",
        "The letter made {name} so happy that",
        "The coach was proud of {name}, because this season",
        "Whenever {name} is nervous,",
        "On Fridays {name} works late, and then",
        "The children ran to {name} as soon as",
        "Even though {name} hates flying,",
        "Nobody could find {name}, so we thought that",
        "The bank wrote to {name} last week, and yesterday",
        "Unless {name} leaves right now,",
        "A friend of mine saw {name} at the station, where",
        "The judge listened to {name} and then asked what",
        "As soon as {name} sat down,",
        "The book was so exciting that {name} forgot where",
        "According to the nurse, {name} is feeling better and",
        "For many years {name} ran a small shop, until",
        "The news reached {name} at work, just when",
        "The concert was cancelled, so {name} said that",
        "The room went quiet when {name} said that",
        "Only {name} knew the secret, and",
        "Thanks to the scholarship, {name} could study where",
        "Somehow {name} always finds a solution before",
        "That morning {name} missed the bus, because",
        "The whole team waited for {name}, but",
    ),
}
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "discovery": {
        "female": words("Anna Laura Alice Julia Sarah Clara Diana Maria Helen Lucy Ruth Eva Amy Sophie Rebecca"),
        "male": words("Paul Peter David Robert Thomas Daniel Oscar Henry Victor Martin Simon Arthur Walter Jack Kevin"),
    },
    "validation": {
        "female": words(
            "Mary Kate Susan Linda Karen Jane Rachel Lisa Nancy Emma Catherine Sandra Emily Jessica Martha "
            "Elizabeth Melissa Dorothy Katherine Christine Heather Diane Julie Victoria Charlotte"
        ),
        "male": words(
            "John Michael James William Richard Joseph Charles Steven Andrew George Philip Eric Harry Patrick Carl "
            "Matthew Joshua Timothy Jacob Nicholas Jonathan Benjamin Samuel Gregory Frank"
        ),
    },
}


def gendered_pronoun(
    model: HasTokenizer,
    n: int = 32,
    seed: int = 0,
    corruption: str = "name",
    bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:
    """n pairs in the split "discovery" and n_validation (default n) in "validation": no shared frame or name.

    The corrupted prompt has a name of the other gender in the same place; answers are " she" and " he", equally often.
    groups: "template" (the frame), "names" (the clean prompt's name), "gender".

    Raises InputError for an n that cannot be made, TokenizerError for a tokenizer with too few single-token names.
    """
    tokenizer = tokenizer_of(model)
    names = {
        split: {g: single_tokens(tokenizer, NAMES[split][g], LEAST_NAMES, f"{g} names") for g in PRONOUNS}
        for split in SPLITS
    }
    most = {split: 2 * len(FRAMES[split]) * min(map(len, names[split].values())) for split in SPLITS}
    sizes = split_sizes(n, n_validation, most, "gendered_pronoun", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, names[split], sizes[split], seed)]
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
