"""Subject-verb agreement across a noun that stands in between: "The keys near the cabinet" -> " are".

The design is that of Linzen et al. 2016 (arXiv:1611.01368) as paired prompts; frames and nouns are our own.
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

CORRUPTIONS = ("number",)
LEAST_NOUNS = 12

# (frame, verb after a singular subject, verb after a plural subject)
FRAMES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "discovery": (
        ("The {subject} near the {other}", "is", "are"),
        ("Last year the {subject} behind the {other}", "was", "were"),
        ("I know that the {subject} beside the {other}", "is", "are"),
        ("Since Monday the {subject} next to the {other}", "has", "have"),
        ("As you can see, the {subject} in front of the {other}", "is", "are"),
        ("When we arrived, the {subject} below the {other}", "was", "were"),
        ("We were told that the {subject} across from the {other}", "was", "were"),
        ("At the moment the {subject} with the {other}", "is", "are"),
        ("In those days the {subject} close to the {other}", "was", "were"),
        ("They believe the {subject} to the left of the {other}", "is", "are"),
        ("A year ago the {subject} around the {other}", "was", "were"),
        ("Right now the {subject} that we saw by the {other}", "is", "are"),
    ),
    "validation": (
        ("My favorite {subject} above the {other}", "is", "are"),
        ("Yesterday the {subject} under the {other}", "was", "were"),
        ("It seems that the {subject} opposite the {other}", "is", "are"),
        ("So far the {subject} from the {other}", "has", "have"),
        ("In this picture, the {subject} on top of the {other}", "is", "are"),
        ("Before the storm, the {subject} along the {other}", "was", "were"),
        ("She remembers that the {subject} inside the {other}", "was", "were"),
        ("Today the {subject} to the right of the {other}", "is", "are"),
        ("Last winter the {subject} beyond the {other}", "was", "were"),
        ("He says that the old {subject} beneath the {other}", "is", "are"),
        ("Long ago the {subject} between the wall and the {other}", "was", "were"),
        ("Again and again the {subject} on the far side of the {other}", "has", "have"),
        ("Nobody noticed that the {subject} past the {other}", "was", "were"),
        ("The new {subject} outside the {other}", "is", "are"),
        ("In winter the {subject} against the {other}", "is", "are"),
        ("Until recently the {subject} over the {other}", "was", "were"),
        ("You can tell that the {subject} without the {other}", "is", "are"),
        ("For a long time the {subject} of the {other}", "has", "have"),
        ("According to the news, the {subject} among the trees by the {other}", "is", "are"),
        ("On Sunday the {subject} at the {other}", "was", "were"),
        ("He told me that the {subject} off the {other}", "is", "are"),
        ("Every day the {subject} at the back of the {other}", "is", "are"),
        ("After the war the {subject} in the {other}", "was", "were"),
        ("Unfortunately the {subject} touching the {other}", "has", "have"),
        ("To my surprise, the {subject} through the {other}", "was", "were"),
        ("The very old {subject} facing the {other}", "is", "are"),
        ("In the morning the {subject} leaning on the {other}", "was", "were"),
        ("Sometimes the {subject} which we saw from the {other}", "is", "are"),
        ("Her first {subject} toward the {other}", "was", "were"),
        ("Ever since, the {subject} within the {other}", "has", "have"),
        ("On the left the {subject} surrounding the {other}", "is", "are"),
        ("The strange {subject} that came with the {other}", "is", "are"),
        ("Two weeks ago the {subject} at the end of the {other}", "was", "were"),
        ("I doubt that the {subject} at the top of the {other}", "is", "are"),
        ("Of course the {subject} at the bottom of the {other}", "is", "are"),
        ("During the night the {subject} in the middle of the {other}", "was", "were"),
        ("As usual, the {subject} on the corner of the {other}", "is", "are"),
        ("Some say that the {subject} underneath the {other}", "was", "were"),
        ("Over the years the {subject} away from the {other}", "has", "have"),
        ("In my dream the {subject} on the roof of the {other}", "was", "were"),
        ("At last the {subject} at the edge of the {other}", "is", "are"),
        ("The only {subject} on the other side of the {other}", "is", "are"),
        ("In his letter, the {subject} in the shadow of the {other}", "is", "are"),
        ("Back then the {subject} for the {other}", "was", "were"),
        ("By midnight the {subject} far from the {other}", "was", "were"),
        ("Lately the {subject} which nobody moved from the {other}", "has", "have"),
        ("According to the guide, the {subject} adjacent to the {other}", "is", "are"),
        ("This evening the {subject} hidden by the {other}", "is", "are"),
    ),
}
# Nouns that add an "s": singular and plural are then easily single tokens both.
NOUNS: Mapping[str, tuple[str, ...]] = {
    "discovery": words(
        "key cabinet doctor student dog horse book picture car boat door table clock song film ball cup "
        "bottle tree flower apple worker singer writer judge king driver guest brother friend hotel tower "
        "road mountain garden school store computer camera tool pen coin shirt boot"
    ),
    "validation": words(
        "letter window farmer teacher cat bird truck ship plane train chair lamp map report poem movie "
        "game toy plate bag basket plant lemon pilot nurse actor lawyer soldier queen guard manager "
        "sister visitor house bridge river lake forest farm museum shop engine machine pencil ring coat "
        "painting village hill temple kitchen hospital"
    ),
}


def sva(
    model: HasTokenizer,
    n: int = 32,
    seed: int = 0,
    corruption: str = "number",
    bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:
    """n pairs in the split "discovery" and n_validation (default n) in "validation": no shared frame or noun.

    The corrupted prompt has the subject in the other number; the other noun stays. Clean subjects are singular as often
    as plural, and the other noun has the same number as often as not. groups: "template" (the frame), "names" (the
    subject's singular), "other" ("same" or "opposite" number).

    Raises InputError for an n that cannot be made, TokenizerError for a tokenizer with too few single-token nouns.
    """
    tokenizer = tokenizer_of(model)
    nouns = {split: _nouns(tokenizer, split) for split in SPLITS}
    most = {split: 4 * len(FRAMES[split]) * len(nouns[split]) for split in SPLITS}
    sizes = split_sizes(n, n_validation, most, "sva", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, nouns[split], sizes[split], seed)]
    return build_pairs(rows, tokenizer, bos=bos, corruption=corruption, task="sva")


def _nouns(tokenizer: object, split: str) -> tuple[str, ...]:
    single = single_tokens(tokenizer, NOUNS[split], LEAST_NOUNS, "nouns")
    plural = set(single_tokens(tokenizer, [f"{noun}s" for noun in single], LEAST_NOUNS, "plural nouns"))
    return tuple(noun for noun in single if f"{noun}s" in plural)


def _rows(split: str, nouns: Sequence[str], n: int, seed: int) -> list[Row]:
    draw = generator_for("sva", split, seed)
    frames = shuffled(FRAMES[split], draw)
    subjects, others = BalancedSampler(nouns, draw), BalancedSampler(nouns, draw)
    seen: defaultdict[tuple[str, bool, bool], set[str]] = defaultdict(set)
    rows = []
    for row, (frame, singular, plural) in zip(range(n), cycle(frames), strict=False):
        # The four combinations of the nouns' numbers in turn, within each frame and over frames.
        kind = (row // len(frames) + row % len(frames)) % 4
        many, same = kind % 2 == 1, kind // 2 == 0
        # Not twice in one frame with the same numbers: the prompts could be equal.
        subject = subjects.draw(exclude=seen[frame, many, same])
        seen[frame, many, same].add(subject)
        other = others.draw(exclude={subject})
        texts = [
            frame.format(subject=_number(subject, is_many), other=_number(other, many == same))
            for is_many in (many, not many)
        ]
        verbs = (plural, singular) if many else (singular, plural)
        groups = {"template": frame, "names": subject, "other": "same" if same else "opposite"}
        rows.append(Row(texts[0], texts[1], f" {verbs[0]}", f" {verbs[1]}", groups, split, edits=1))
    return rows


def _number(noun: str, many: bool) -> str:
    return f"{noun}s" if many else noun
