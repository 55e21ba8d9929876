"""Questions in which one word or line decides: which decade comes later, a word's translation, whether code is safe.

    greater_than    "The war lasted from the year 1762 to the year 17" -> a later decade (after Hanna et al. 2023)
    translation     "water = eau, night = nuit, day =" -> " jour"
    insecure_code   a line of Python, and whether it is insecure -> " yes"

In the corrupted prompt another word or line of as many tokens stands in its place, with another answer. The last two
are less tidy than the other tasks: a small model may well not do them, and then the search for a circuit says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

from vesalius.data.tasks.base import (
    SPLITS,
    HasTokenizer,
    Row,
    build_pairs,
    continuation,
    encode,
    shuffled,
    split_sizes,
    tokenizer_of,
    too_few,
)
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

CORRUPTIONS = ("word",)
FEWEST = 6

YEARS: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "The war lasted from the year {} to the year",
        "The drought went on from the year {} to the year",
        "The expedition ran from the year {} to the year",
        "The alliance held from the year {} to the year",
        "The exhibition was open from the year {} to the year",
        "The dispute dragged on from the year {} to the year",
    ),
    "validation": (
        "The reign lasted from the year {} to the year",
        "The siege went on from the year {} to the year",
        "The famine lasted from the year {} to the year",
        "The contract was valid from the year {} to the year",
        "The voyage took them from the year {} to the year",
        "The school was led by him from the year {} to the year",
        "The treaty was in force from the year {} to the year",
        "The company traded from the year {} to the year",
        "The rebellion went on from the year {} to the year",
        "The building was under repair from the year {} to the year",
    ),
}
DECADES = tuple(product((6, 7, 8), (1, 2, 3)))
"""Decade of the clean prompt, and of the corrupted one."""
CENTURIES: Mapping[str, tuple[int, ...]] = {"discovery": (17, 18), "validation": (14, 15, 16, 19)}

WORDS: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "English: water. {language}: {water}. English: night. {language}: {night}. English: {}. {language}:",
        "Water is {water}, night is {night}, {} is",
        "A small dictionary from English to {language}: water = {water}, night = {night}, {} =",
        "In {language}, water is {water}, night is {night} and {} is",
        "Translate into {language}. water: {water}; night: {night}; {}:",
    ),
    "validation": (
        "English word: water. {language} word: {water}. English word: {}. {language} word:",
        "water = {water}, night = {night}, {} =",
        "Words and what they are in {language}: water is {water}; night is {night}; {} is",
        "The {language} for water is {water}, for night it is {night} and for {} it is",
        "Vocabulary, English and {language}. water: {water}. night: {night}. {}:",
        "She learns {language} words: water is {water}, night is {night}, {} is",
        "English and {language}. night = {night}. water = {water}. {} =",
    ),
}
LANGUAGES: Mapping[str, Mapping[str, str]] = {
    "French": {"language": "French", "water": "eau", "night": "nuit"},
    "German": {"language": "German", "water": "Wasser", "night": "Nacht"},
}
DICTIONARY: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "discovery": {
        "French": {"day": "jour", "country": "pays", "name": "nom", "sea": "mer", "lake": "lac", "good": "bon",
                   "world": "monde", "house": "maison", "book": "livre"},
        "German": {"book": "Buch", "man": "Mann", "God": "Gott", "stone": "Stein", "day": "Tag", "and": "und",
                   "world": "Welt", "house": "Haus"},
    },
    "validation": {
        "French": {"body": "corps", "green": "vert", "big": "grand", "tower": "tour", "hand": "main", "in": "dans",
                   "city": "ville", "time": "temps", "life": "vie"},
        "German": {"field": "Feld", "child": "Kind", "mountain": "Berg", "with": "mit", "from": "von", "city": "Stadt",
                   "time": "Zeit", "woman": "Frau"},
    },
}  # fmt: skip
"""Of these, the words that are one token are used; tokenizers made for English have about a dozen."""

CODE: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "Line: {}\nIs this line of Python insecure? Answer yes or no. Answer:",
        "Code review.\n>>> {}\nSecurity problem (yes or no):",
        "{}\n# Could an attacker misuse the line above? (yes/no):",
        "Review this code for security holes:\n    {}\nIs it vulnerable, yes or no? It is a",
    ),
    "validation": (
        "Snippet: {}\nDoes the snippet have a security hole, yes or no? Answer:",
        "Audit\ncode: {}\ninsecure (yes or no):",
        "{}\n# Is the line above dangerous with input from strangers? (yes/no):",
        "A student wrote:\n    {}\nIs that a security risk, yes or no? Answer:",
        "Checklist\nline: {}\nexploitable (yes or no):",
        "Question: is `{}` insecure, yes or no? Answer:",
    ),
}
LINES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "discovery": (
        ("value = eval(text)", "value = int(text)"), ("exec(text)", "print(text)"),
        ("os.system(name)", "os.remove(name)"),
        ("data = pickle.load(file)", "data = json.load(file)"), ("run(text, shell=True)", "run(text, shell=False)"),
        ("get(url, verify=False)", "get(url, verify=True)"), ("app.run(debug=True)", "app.run(debug=False)"),
        ("key = random.random()", "key = secrets.random()"), ("tree = yaml.load(text)", "tree = json.load(text)"),
        ("password = 'secret'", "password = input()"),
    ),
    "validation": (
        ("result = eval(request)", "result = len(request)"), ("exec(command)", "log(command)"),
        ("os.system(command)", "os.getenv(command)"), ("state = pickle.loads(body)", "state = json.loads(body)"),
        ("call(user, shell=True)", "call(user, shell=False)"), ("post(url, verify=False)", "post(url, verify=True)"),
        ("server.start(debug=True)", "server.start(debug=False)"),
        ("digest = md5(password)", "digest = bcrypt(password)"),
        ("token = random.choice(letters)", "token = secrets.choice(letters)"),
        ("os.chmod(path, 0o777)", "os.chmod(path, 0o600)"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Swap:
    """What stands in the clean and in the corrupted prompt, and what follows each."""

    clean: str
    corrupted: str
    answer: str
    distractor: str
    end: str = ""
    """What the prompt ends with, after its frame."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """More to fill the frame with."""

    def prompts(self, frame: str) -> tuple[str, str]:
        """The clean and the corrupted prompt."""
        clean, corrupted = (frame.format(text, **self.fields) + self.end for text in (self.clean, self.corrupted))
        return clean, corrupted


def greater_than(
    model: HasTokenizer, n: int = 32, seed: int = 0, corruption: str = "word", bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:  # fmt: skip
    """n pairs in "discovery" and n_validation (default n) in "validation", which share no frame.

    The clean prompt begins in a late decade; the answer is the digit of a later one, the distractor that of one between
    it and the early decade in which the corrupted prompt begins. groups: "template" (the frame), "names" (the years).

    Raises InputError for an n that cannot be made, TokenizerError for a tokenizer that joins the digits of a year.
    """
    found = {
        split: [
            Swap(f"{century}{late}{unit}", f"{century}{early}{unit}", "9", str((early + late + 1) // 2), f" {century}")
            for (late, early), century, unit in product(DECADES, centuries, (2, 5, 7))
        ]
        for split, centuries in CENTURIES.items()
    }
    return _pairs(model, "greater_than", YEARS, found, n, seed, corruption, bos, n_validation)


def translation(
    model: HasTokenizer, n: int = 32, seed: int = 0, corruption: str = "word", bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:  # fmt: skip
    """n pairs in "discovery" and n_validation (default n) in "validation": no shared frame or word.

    The corrupted prompt asks for another word, whose translation is the distractor. groups: "template" (the frame),
    "names" (both words). Raises as `greater_than`, also for a tokenizer with too few French and German words of one
    token.
    """
    found = {
        split: [
            Swap(one, two, f" {table[one]}", f" {table[two]}", fields=LANGUAGES[language])
            for language, table in by_language.items()
            for one, two in product(table, table)
            if one != two
        ]
        for split, by_language in DICTIONARY.items()
    }
    return _pairs(model, "translation", WORDS, found, n, seed, corruption, bos, n_validation)


def insecure_code(
    model: HasTokenizer, n: int = 32, seed: int = 0, corruption: str = "word", bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:  # fmt: skip
    """n pairs in "discovery" and n_validation (default n) in "validation": no shared frame or line of code.

    Half of the clean prompts hold an insecure line of Python (" yes"), half one without that problem (" no"), and the
    corrupted prompts the other one. groups: "template" (the frame), "names" (the two lines). Raises as `greater_than`.
    """
    found = {
        split: [s for bad, good in lines for s in (Swap(bad, good, " yes", " no"), Swap(good, bad, " no", " yes"))]
        for split, lines in LINES.items()
    }
    return _pairs(model, "insecure_code", CODE, found, n, seed, corruption, bos, n_validation)


def _pairs(
    model: HasTokenizer,
    name: str,
    frames: Mapping[str, Sequence[str]],
    swaps: Mapping[str, Sequence[Swap]],
    n: int,
    seed: int,
    corruption: str,
    bos: str,
    n_validation: int | None,
) -> Pairs:
    tokenizer = tokenizer_of(model)
    made = {split: _rows(tokenizer, name, split, frames[split], swaps[split], seed) for split in SPLITS}
    most = {split: len(rows) for split, rows in made.items()}
    sizes = split_sizes(n, n_validation, most, name, corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in made[split][: sizes[split]]]
    return build_pairs(rows, tokenizer, bos=bos, corruption=corruption, task=name)


def _rows(
    tokenizer: object, name: str, split: str, frames: Sequence[str], swaps: Sequence[Swap], seed: int
) -> list[Row]:
    """Every frame with every swap that fits the tokenizer, in an order that uses all about equally often."""
    draw: torch.Generator = generator_for(name, split, seed)
    fitting = [swap for swap in shuffled(swaps, draw) if _fits(tokenizer, frames[0], swap)]
    if len({swap.clean for swap in fitting}) < FEWEST:
        raise too_few(len(fitting), len(swaps), FEWEST, f"words or answers of {name}, in pairs of equal length,")
    order, found = shuffled(frames, draw), []
    for number in range(len(fitting) * len(order)):
        swap = fitting[number % len(fitting)]
        frame = order[(number + number // len(fitting)) % len(order)]
        groups = {"template": frame, "names": "|".join(sorted((swap.clean, swap.corrupted)))}
        clean, corrupted = swap.prompts(frame)
        found.append(Row(clean, corrupted, swap.answer, swap.distractor, groups, split))
    # No prompt twice, whatever it is compared with.
    return list({row.clean: row for row in reversed(found)}.values())[::-1]


def _fits(tokenizer: object, frame: str, swap: Swap) -> bool:
    """Whether both prompts are equally long, and both answers one known token after them."""
    clean, corrupted = swap.prompts(frame)
    ids = [continuation(tokenizer, clean, text) for text in (swap.answer, swap.distractor)]
    unknown = getattr(tokenizer, "unk_token_id", None)
    single = all(one is not None and len(one) == 1 and one[0] != unknown for one in ids)
    return single and ids[0] != ids[1] and len(encode(tokenizer, clean)) == len(encode(tokenizer, corrupted))
