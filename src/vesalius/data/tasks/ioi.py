"""Indirect object identification: of two names, the one that is not repeated receives the object.

The task is that of Wang et al. 2022 (arXiv:2211.00593, section 2 and appendix A); frames, names, places and objects are
our own. IO is the name that receives, S the subject, mentioned first at S1 and again at S2.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from vesalius.data.positions import Positions, named_positions
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

CORRUPTIONS = ("swap", "abc")
LEAST_NAMES = 24

# {A} and {B} are the names in the order they are mentioned, {S} is the subject again. A frame that begins with a name
# begins with a space, so that the name is the same token as everywhere else.
FRAMES: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "After {A} and {B} finished lunch at the {place}, {S} handed the {object} to",
        "When {A} and {B} met at the {place} this morning, {S} gave a {object} to",
        "While {A} and {B} were waiting outside the {place}, {S} passed the {object} to",
        "Then {A} and {B} drove to the {place} together, and {S} offered a {object} to",
        "Yesterday {A} and {B} went shopping near the {place}, and {S} bought a {object} for",
        "Because {A} and {B} had agreed to meet at the {place}, {S} brought a {object} to",
        "At the {place}, {A} and {B} sat on a bench for an hour. At last {S} showed the {object} to",
        "It was raining when {A} and {B} left the {place}. On the way home {S} returned the {object} to",
        "As soon as {A} and {B} got back from the {place}, {S} gave the old {object} to",
        "Once {A} and {B} were alone in the {place}, {S} quietly slipped a {object} to",
        "Everyone saw {A} and {B} dancing at the {place}. Later that night {S} sent a {object} to",
        "The rain stopped, so {A} and {B} walked to the {place}, where {S} lent a {object} to",
        "Later {A} and {B} returned to the {place}, and this time {S} gave a {object} to",
        "Since {A} and {B} had worked late at the {place}, {S} decided to give the {object} to",
        " {A} and {B} stood in a long line at the {place}. Before it moved, {S} handed the {object} to",
        " {A} and {B} cleaned the {place} all afternoon, and then {S} carried the {object} over to",
    ),
    "validation": (
        "During the trip to the {place}, {A} and {B} took many pictures, and {S} mailed a {object} to",
        "One evening {A} and {B} stayed in the {place} until dark, and {S} brought the {object} to",
        "Although {A} and {B} had never been to the {place} before, {S} promised a {object} to",
        "In the middle of the {place}, {A} and {B} stopped to rest. Smiling, {S} threw the {object} to",
        "Last summer {A} and {B} painted the {place}. To say thanks, {S} presented a {object} to",
        "If {A} and {B} ever come to the {place} again, {S} will surely bring a {object} to",
        "Two hours later {A} and {B} reached the {place}, tired and hungry, and {S} tossed the {object} to",
        "The guide told {A} and {B} to hurry through the {place}, so {S} quickly gave the {object} to",
        "Nobody noticed how {A} and {B} entered the {place}, or how {S} delivered the {object} to",
        "On Sunday {A} and {B} organized a party in the {place}, and {S} awarded the {object} to",
        "Moments after {A} and {B} opened the {place}, {S} handed the {object} to",
        "Not far from the {place}, {A} and {B} began to argue until {S} gave the {object} to",
        "Every week {A} and {B} play cards at the {place}, and every week {S} loses a {object} to",
        "Long ago {A} and {B} shared a room near the {place}, and {S} once lent a {object} to",
        " {A} and {B} took the early bus to the {place}. During the ride {S} offered a {object} to",
        " {A} and {B} argued about the price of the {place}, but in the end {S} left the {object} to",
        "On the way back from the {place}, {A} and {B} got lost for a while, and {S} handed the {object} to",
        "While the others slept, {A} and {B} crept into the {place}, and there {S} gave the {object} to",
        "The manager asked {A} and {B} to wait in the {place}, and meanwhile {S} passed a {object} to",
        "Right after {A} and {B} rented the {place} for a weekend, {S} bought a {object} for",
        "Before sunrise {A} and {B} hurried across the {place}, and without a word {S} threw a {object} to",
        "The teacher took {A} and {B} to the {place} last week, where {S} showed a {object} to",
        "For years {A} and {B} had worked side by side in the {place}, so {S} gave the {object} to",
        "Everybody clapped when {A} and {B} walked into the {place}, and then {S} presented the {object} to",
        "It was already dark in the {place} when {A} and {B} said goodbye, and {S} returned the {object} to",
        "Thanks to the map, {A} and {B} found the {place} at once. There {S} offered the {object} to",
        "Just as {A} and {B} were about to leave the {place}, {S} remembered to give the {object} to",
        "A stranger watched {A} and {B} from across the {place} while {S} slipped the {object} to",
        "Neither the noise nor the crowd in the {place} bothered {A} and {B}, and {S} read a {object} to",
        "The photo shows {A} and {B} in front of the {place}, just before {S} handed a {object} to",
        "In spring {A} and {B} opened a shop beside the {place}, and on the first day {S} sold a {object} to",
        "Twice a month {A} and {B} clean the {place} for free, and each time {S} brings a {object} to",
        "According to the story, {A} and {B} were hiding in the {place} when {S} tossed a {object} to",
        "With the windows of the {place} wide open, {A} and {B} sang for hours. Later {S} passed the {object} to",
        "Rumor has it that {A} and {B} quarrelled in the {place}, and that {S} never returned the {object} to",
        "Next to the old {place}, {A} and {B} planted a tree. When it was done, {S} gave a {object} to",
        "By the time {A} and {B} arrived, the {place} was closed, so {S} simply lent the {object} to",
        "During the fire drill {A} and {B} ran out of the {place}, and outside {S} handed the {object} to",
        "Some people met {A} and {B} at the {place} on Friday, the day {S} sold the {object} to",
        "A week before the wedding, {A} and {B} visited the {place}, and {S} secretly sent a {object} to",
        "The radio was playing as {A} and {B} drove past the {place}, and {S} pointed out a {object} to",
        "Both {A} and {B} wanted to see the {place}, but only {S} thought of bringing a {object} for",
        "For her birthday party {A} and {B} decorated the {place}, and later {S} lent a {object} to",
        "Despite the cold, {A} and {B} spent the night in the {place}, and {S} offered the warm {object} to",
        "As the bell rang, {A} and {B} rushed into the {place}, where {S} quickly threw the {object} to",
        "Somewhere behind the {place}, {A} and {B} shared a meal, and in return {S} promised the {object} to",
        " {A} and {B} had a long talk in the {place} about money, after which {S} mailed the {object} to",
        " {A} and {B} watched the sunset from the {place}. When it got cold, {S} passed the {object} over to",
    ),
}
NAMES: Mapping[str, tuple[str, ...]] = {
    "discovery": words(
        "Anna Paul Peter Laura David Alice Robert Julia Thomas Sarah Daniel Nina Oscar Clara Henry Diana "
        "Felix Maria Victor Helen Martin Lucy Simon Ruth Arthur Eva Walter Amy Jack Sophie Kevin Rebecca "
        "Brian Hannah Edward Margaret Ryan Emily Jason Barbara Adam Nicole"
    ),
    "validation": words(
        "Mary John Kate Michael Susan James Linda William Karen Richard Jane Joseph Rachel Charles Lisa "
        "Steven Nancy Andrew Emma George Philip Catherine Eric Sandra Scott Rosa Tom Jennifer Patrick "
        "Olivia Harry Jessica Gary Amanda Nathan Michelle Roger Angela Ben Martha Carl Samantha "
        "Matthew Joshua Kenneth Timothy Jeffrey Jacob Nicholas Jonathan Stephen Larry Justin Benjamin Samuel "
        "Gregory Alexander Frank Raymond Dennis Jerry Tyler Aaron Douglas Ethan Noah Jeremy Keith Terry Sean "
        "Harold Alan Albert Vincent Elizabeth Ashley Carol Melissa Deborah Stephanie Dorothy Sharon Kathleen "
        "Katherine Christine Janet Heather Diane Julie Joyce Victoria Christina Andrea Teresa Abigail Sophia "
        "Charlotte Claire Molly Lily Sally"
    ),
}
PLACES: Mapping[str, tuple[str, ...]] = {
    "discovery": ("market", "station", "library", "bakery", "harbor", "theater", "school", "clinic"),
    "validation": ("museum", "cafe", "garden", "hotel", "castle", "stadium", "farm", "gallery"),
}
OBJECTS: Mapping[str, tuple[str, ...]] = {
    "discovery": ("ticket", "book", "basket", "camera", "key", "sandwich", "map", "blanket"),
    "validation": ("letter", "ring", "coin", "bottle", "report", "cake", "postcard", "necklace"),
}


@dataclass(frozen=True)
class Draft:
    """What a clean prompt and its corruptions are filled in from."""

    frame: str
    order: str
    io: str
    s: str
    place: str
    object: str

    def write(self, io: str, s1: str, s2: str) -> str:
        first, second = (io, s1) if self.order == "ABBA" else (s1, io)
        return self.frame.format(A=first, B=second, S=s2, place=self.place, object=self.object)


def ioi(
    model: HasTokenizer,
    n: int = 32,
    seed: int = 0,
    corruption: str = "swap",
    bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:
    """n pairs in the split "discovery" and n_validation (default n) in "validation".

    The splits share no frame, name, place or object.

    "After Anna and Paul finished lunch at the market, Paul handed the ticket to" -> " Anna" (distractor " Paul").
    corruption "swap": S2 becomes IO, which exchanges answer and distractor. "abc": all three names become three other
    names of the split. The clean prompts depend on n and seed only. groups: "template" (the frame), "names" (the two
    names, without order), "order" ("ABBA": the answer is mentioned first; "BABA": second). Frames, the two orders
    within each, and names are used equally often, and the same two names as rarely as possible.

    The validation split has three times as many frames: each is one test of what was found, and it takes about forty to
    decide a claim of a family.

    Raises InputError for an n that cannot be made, UnknownNameError for a corruption, TokenizerError for a tokenizer
    with fewer than 24 of a split's names as single tokens.
    """
    tokenizer = tokenizer_of(model)
    names = {split: single_tokens(tokenizer, NAMES[split], LEAST_NAMES, "names") for split in SPLITS}
    most = {split: 2 * len(FRAMES[split]) * len(names[split]) * (len(names[split]) - 1) for split in SPLITS}
    sizes = split_sizes(n, n_validation, most, "ioi", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, names[split], sizes[split], seed, corruption)]
    pairs = build_pairs(rows, tokenizer, bos=bos, corruption=corruption, task="ioi")
    return replace(pairs, named_positions={**pairs.named_positions, **ioi_positions(pairs)})


def _rows(split: str, names: Sequence[str], n: int, seed: int, corruption: str) -> list[Row]:
    others = BalancedSampler(names, generator_for("ioi", split, seed, "other names"))
    return [_row(draft, split, corruption, others) for draft in _drafts(split, names, n, seed)]


def _row(draft: Draft, split: str, corruption: str, others: BalancedSampler[str]) -> Row:
    if corruption == "swap":
        corrupted = draft.write(draft.io, draft.s, draft.io)
    else:
        taken = [draft.io, draft.s]
        for _ in range(3):
            taken.append(others.draw(exclude=taken))
        corrupted = draft.write(*taken[2:])
    return Row(
        clean=draft.write(draft.io, draft.s, draft.s),
        corrupted=corrupted,
        answer=f" {draft.io}",
        distractor=f" {draft.s}",
        groups={"template": draft.frame.strip(), "names": "|".join(sorted((draft.io, draft.s))), "order": draft.order},
        split=split,
        edits=1 if corruption == "swap" else 3,
    )


def _drafts(split: str, names: Sequence[str], n: int, seed: int) -> list[Draft]:
    """n distinct drafts: frames in turn, each frame in its two orders in turn, the least used names."""
    draw = generator_for("ioi", split, seed, "scenes")
    frames = shuffled(FRAMES[split], draw)
    word_lists = (names, PLACES[split], OBJECTS[split])
    sampler, places, objects = (BalancedSampler(items, draw) for items in word_lists)
    together: Counter[frozenset[str]] = Counter()
    used: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    drafts = []
    for row, frame in zip(range(n), cycle(frames), strict=False):
        # Neighbouring frames start with different orders, so that orders balance over frames as well as within them.
        order = ("ABBA", "BABA")[(row // len(frames) + row % len(frames)) % 2]
        io, s = _two_names(sampler, together, used[frame, order])
        drafts.append(Draft(frame, order, io, s, places.draw(), objects.draw()))
    return drafts


def _two_names(
    sampler: BalancedSampler[str], together: Counter[frozenset[str]], used: set[tuple[str, str]]
) -> tuple[str, str]:
    """IO and S: the least used, the least often together, and not yet used with this frame and order."""
    full = {io for io, count in Counter(io for io, _ in used).items() if count == len(sampler.items) - 1}
    io = sampler.draw(exclude=full)
    met = {io, *(s for first, s in used if first == io)}
    s = sampler.draw(exclude=met, cost=lambda name: together[frozenset((io, name))])
    used.add((io, s))
    together[frozenset((io, s))] += 1
    return io, s


def ioi_positions(pairs: Pairs) -> dict[str, Positions]:
    """Positions [example] in the clean prompt: "io", "s1", "s1_next" (after S1), "s2", "end"; -1: none."""
    found = named_positions(pairs)
    s1 = found["distractor_first"]
    return {
        "io": found["answer"],
        "s1": s1,
        "s1_next": torch.where(s1 >= 0, s1 + 1, -1),
        "s2": found["distractor_last"],
        "end": found["end"],
    }
