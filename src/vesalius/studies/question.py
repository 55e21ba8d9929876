"""The question of a study: prompts with their corruptions, split into discovery and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.data import TASKS, load_pairs
from vesalius.data.tasks import task as task_named
from vesalius.errors import FileFormatError, PairsError, TokenizerError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Part, as_part
from vesalius.quantities import Contrast
from vesalius.site import Site

SPLITS = ("discovery", "validation")
SAMPLED = ("template", "names", "entity")
FEWEST = 4


@dataclass(frozen=True, eq=False)
class Question:
    """corruptions: name -> Pairs with both splits; the first is the main one, and all share the same clean prompts.

    metric: what is measured. components: what a circuit may be made of; default the embeddings, heads and MLPs.
    """

    name: str
    text: str
    corruptions: Mapping[str, Pairs]
    bos: str = "none"
    seed: int = 0
    metric: Metric = logit_diff
    components: tuple[Part | Site | str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.corruptions:
            raise PairsError("a question needs pairs of at least one corruption; got none")
        for name, pairs in self.corruptions.items():
            missing = [split for split in SPLITS if split not in pairs.split_names]
            if missing:
                raise PairsError(
                    f"the pairs of corruption {name!r} have no {' and no '.join(missing)} split; a study needs both"
                )
            for split in SPLITS:
                if len(pairs.split(split)) < FEWEST:
                    raise PairsError(
                        f"the {split} split has {len(pairs.split(split))} pairs; a study needs at least {FEWEST}"
                    )

    @property
    def main(self) -> str:
        return next(iter(self.corruptions))

    def contrast(self, split: str) -> Contrast:
        """The pairs of one split, with the metric."""
        return Contrast(self.split(split), self.metric)

    def split(self, name: str) -> dict[str, Pairs]:
        """Corruption -> pairs of one split."""
        return {corruption: pairs.split(name) for corruption, pairs in self.corruptions.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(self.corruptions[self.main].split(name)) for name in SPLITS}

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        plan = {"name": self.name, "seed": self.seed, "pairs": {k: v.content_hash for k, v in self.corruptions.items()}}
        if self.components is not None:
            plan["components"] = [as_part(one).ref for one in self.components]
        return plan if self.metric is logit_diff else {**plan, "metric": [self.metric.name, self.metric.unit]}


def question_for(
    what: str, model: Model, *, n: int = 32, n_validation: int | None = None, seed: int = 0, bos: str = "auto"
) -> Question:
    """A built-in question by name, or the user's own pairs by path.

    n, n_validation: prompt pairs of the two splits of a built-in question; by default half as many again to test on as
    to search on, because how much can be decided depends on how many templates a claim is tested on.

    Raises UnknownNameError for a name that is neither, TokenizerError for tokens that the model does not have, and the
    errors of tasks and pair files.
    """
    check_question(what)
    if what in TASKS:
        built = task_named(what)
        sizes = {"n": n, "n_validation": n * 3 // 2 if n_validation is None else n_validation}
        made = {c: built.build(model, **sizes, seed=seed, corruption=c, bos=bos) for c in built.corruptions}
        pairs = {c: sampling_groups(_within(model, p)) for c, p in made.items()}
        return Question(what, built.question, pairs, next(iter(pairs.values())).bos, seed)
    own = sampling_groups(_within(model, load_pairs(what, model, bos=bos)))
    name = Path(what).stem
    return Question(
        name, f"How does the model choose its answers in {Path(what).name}?", {own.corruption: own}, own.bos, seed
    )


def _within(model: Model, pairs: Pairs) -> Pairs:
    """The pairs, if the model has all their tokens."""
    vocab = model.architecture[1].vocab
    largest = max(int(ids.max()) for ids in (pairs.clean, pairs.corrupted, pairs.answer, pairs.distractor))
    if largest >= vocab:
        raise TokenizerError(
            f"the tokenizer gives token id {largest}, but {model.name} has a vocabulary of {vocab}; "
            "is this its tokenizer?"
        )
    return pairs


def sampling_groups(pairs: Pairs) -> Pairs:
    """The pairs with those groups that were sampled.

    A kind of label that both splits share on purpose (an order, a gender) is a condition, and keeping it would make
    discovery and validation overlap. Raises PairsError when templates, names or entities themselves are shared, or the
    pairs have no splits.
    """
    if not pairs.splits:
        raise PairsError(f"pairs without splits; a study needs {' and '.join(SPLITS)}: give Pairs(..., splits=)")
    for kind in SAMPLED:
        shared = pairs.shared_labels(kind) if kind in pairs.groups else set()
        if shared:
            raise PairsError(
                f"{kind} {min(shared)!r} occurs in the discovery and in the validation split; what is found on one "
                f"must be tested on other {kind}: give a split column in which they are disjoint, or leave the {kind} "
                "column out"
            )
    return pairs.sampled_groups()


def check_question(what: str) -> None:
    """Refuses a question that cannot be one, before anything heavy is loaded.

    Raises UnknownNameError for a name that is neither built in nor like a file's, FileFormatError for a file that is
    not there.
    """
    if what in TASKS or Path(what).exists():
        return
    if Path(what).suffix == "" and "/" not in what:
        raise UnknownNameError("question", what, TASKS, "Or give a .jsonl or .csv file with your own pairs.")
    raise FileFormatError(f"there is no file {Path(what).absolute()}")


def example_texts(question: Question, model: Model, row: int = 0) -> dict[str, str]:
    """A discovery prompt, the same prompt under each corruption, its answer and distractor, as text."""

    def text(tokens: Any) -> str:
        # Answers of several tokens are filled up with -1.
        ids = [i for i in tokens.reshape(-1).tolist() if i >= 0]
        return " ".join(map(str, ids)) if model.tokenizer is None else str(model.tokenizer.decode(ids))

    pairs = {name: p.split(SPLITS[0]) for name, p in question.corruptions.items()}
    first = pairs[question.main]
    # The bos token is kept apart from the text; it is the same in every prompt.
    words = slice(0 if question.bos in ("", "none") else 1, int(first.size[row]))
    shown = {name: text(p.corrupted[row, words]) for name, p in pairs.items()}
    return {
        "clean": text(first.clean[row, words]),
        "answer": text(first.answer[row : row + 1]),
        "distractor": text(first.distractor[row : row + 1]),
        **shown,
    }
