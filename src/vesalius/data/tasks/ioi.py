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
    check_request,
    shuffled,
    single_tokens,
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
        "Olivia Harry Jessica Gary Amanda Nathan Michelle Roger Angela Ben Martha Carl Samantha"
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


def ioi(model: HasTokenizer, n: int = 32, seed: int = 0, corruption: str = "swap", bos: str = "auto") -> Pairs:
    """n pairs in each of the splits "discovery" and "validation", which share no frame, name, place or object.

    "After Anna and Paul finished lunch at the market, Paul handed the ticket to" -> " Anna" (distractor " Paul").
    corruption "swap": S2 becomes IO, which exchanges answer and distractor. "abc": all three names become three other
    names of the split. The clean prompts depend on n and seed only. groups: "template" (the frame), "names" (the two
    names, without order), "order" ("ABBA": the answer is mentioned first; "BABA": second). Frames, the two orders
    within each, and names are used equally often, and the same two names as rarely as possible.

    Raises InputError for an n that cannot be made, UnknownNameError for a corruption, TokenizerError for a tokenizer
    with fewer than 24 of a split's names as single tokens.
    """
    tokenizer = tokenizer_of(model)
    names = {split: single_tokens(tokenizer, NAMES[split], LEAST_NAMES, "names") for split in SPLITS}
    maximum = min(2 * len(FRAMES[split]) * len(names[split]) * (len(names[split]) - 1) for split in SPLITS)
    check_request(n, maximum, "ioi", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, names[split], n, seed, corruption)]
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
