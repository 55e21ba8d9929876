"""Recall of a fact: country -> capital. Corrupted: another country, whose capital is the distractor."""

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
    continuation,
    shuffled,
    single_tokens,
    split_sizes,
    tokenizer_of,
    too_few,
)
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

CORRUPTIONS = ("country",)
LEAST_COUNTRIES = 6

FRAMES: Mapping[str, tuple[str, ...]] = {
    "discovery": (
        "The capital of {country} is the city of",
        "If you travel to {country}, you should visit its capital,",
        "The president arrived in {country} today and landed in the capital,",
        "Question: What is the capital of {country}? Answer:",
        "Our tour of {country} begins in the capital city,",
        "She moved to {country} last year and rents a flat in the capital,",
        "Every child who grows up in {country} knows its capital,",
        "The parliament of {country} meets in the capital, which is",
        "The national museum of {country} is in the capital,",
        "He studied the history of {country} at a university in the capital,",
        "Most embassies in {country} are found in its capital,",
        "A train runs across {country} to the capital city of",
    ),
    "validation": (
        " {country}'s capital city is called",
        "The largest airport in {country} is near the capital,",
        "On the map of {country}, a star marks the capital,",
        "Quiz: name the capital of {country}. The right answer is",
        "The government of {country} has its seat in",
        "They flew to {country} and spent a week in the capital,",
        "My uncle comes from {country} and was born in the capital,",
        "A famous bridge in {country} crosses the river in the capital,",
        "News from {country}: thousands marched through the capital,",
        "The football team of {country} plays at home in the capital,",
        "This book about {country} has a chapter on the capital,",
        "The people of {country} are proud of their capital,",
        "The train to the capital of {country} arrives every morning in",
        "Children in {country} learn early that their capital is",
        "A letter from {country} came from the embassy district of the capital,",
        "In {country}, the king once lived in a palace in the capital,",
        "Most tourists who visit {country} land in the capital,",
        "The oldest church in {country} stands in the capital,",
        "Before the war {country} already had the same capital,",
        "The weather in {country} was mild, and it hardly rained in the capital,",
        "If you know {country}, you surely know its capital,",
        "An earthquake in {country} was felt as far as the capital,",
        "The central bank of {country} is located in the capital,",
        "After the election in {country}, crowds filled the streets of the capital,",
        "Her passport from {country} was issued in the capital,",
        "The ministers of {country} gathered last night in the capital,",
        "Our company has an office in {country}, right in the centre of the capital,",
        "The highways of {country} all lead to the capital,",
        "A singer from {country} gave her last concert in the capital,",
        "The newspaper reports from {country} are written in the capital,",
        "It takes three hours to cross {country} by car and reach the capital,",
        "We changed planes in {country}, at the airport of the capital,",
        "The best hospital of {country} is in the capital,",
        "A film about {country} shows the old streets of the capital,",
        "Snow fell all over {country} and even in the capital,",
        "Traders from {country} met every year in the capital,",
        "The tallest building in {country} was built in the capital,",
        "In the atlas, the page for {country} begins with the capital,",
        "My pen friend in {country} lives just outside the capital,",
        "The supreme court of {country} sits in the capital,",
        "At noon the ambassador of {country} flew home to the capital,",
        "The metro was the first in {country} and runs under the capital,",
        "The marathon of {country} starts at the stadium in the capital,",
        "The zoo in {country} that everyone knows is the one in the capital,",
        "The radio station of {country} broadcasts from the capital,",
        "A guide to {country} usually starts with a walk through the capital,",
        "The university of {country} with the most students is in the capital,",
        "For the summit the leaders travelled to {country} and met in the capital,",
    ),
}
CAPITALS: Mapping[str, Mapping[str, str]] = {
    "discovery": {
        "France": "Paris", "Italy": "Rome", "Russia": "Moscow", "China": "Beijing", "Greece": "Athens",
        "Austria": "Vienna", "Norway": "Oslo", "Denmark": "Copenhagen", "Portugal": "Lisbon", "Scotland": "Edinburgh",
        "Hungary": "Budapest", "Iraq": "Baghdad", "Kenya": "Nairobi", "Cuba": "Havana", "Chile": "Santiago",
        "Belgium": "Brussels", "Australia": "Canberra", "Tunisia": "Tunis", "Turkey": "Ankara", "Romania": "Bucharest",
        "Croatia": "Zagreb", "Indonesia": "Jakarta", "Lebanon": "Beirut", "Morocco": "Rabat", "Uganda": "Kampala",
    },
    "validation": {
        "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "England": "London",
        "Poland": "Warsaw", "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin", "Wales": "Cardiff",
        "Iran": "Tehran", "Syria": "Damascus", "Canada": "Ottawa", "Peru": "Lima", "Bulgaria": "Sofia",
        "Afghanistan": "Kabul", "Switzerland": "Bern", "Jamaica": "Kingston", "Thailand": "Bangkok",
        "Serbia": "Belgrade", "Vietnam": "Hanoi", "Ghana": "Accra", "Nepal": "Kathmandu", "Qatar": "Doha",
        "Latvia": "Riga",
    },
}  # fmt: skip


def capitals(
    model: HasTokenizer,
    n: int = 32,
    seed: int = 0,
    corruption: str = "country",
    bos: str = "auto",
    n_validation: int | None = None,
) -> Pairs:
    """n pairs in the split "discovery" and n_validation (default n) in "validation": no shared frame or country.

    The corrupted prompt names another country of the split with as many tokens; its capital is the distractor.
    groups: "template" (the frame), "names" (the country of the clean prompt).

    Raises InputError for an n that cannot be made, TokenizerError for a tokenizer with too few single-token capitals.
    """
    tokenizer = tokenizer_of(model)
    partners = {split: _partners(tokenizer, split) for split in SPLITS}
    most = {split: len(FRAMES[split]) * len(partners[split]) for split in SPLITS}
    sizes = split_sizes(n, n_validation, most, "capitals", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, partners[split], sizes[split], seed)]
    return build_pairs(rows, tokenizer, bos=bos, corruption=corruption, task="capitals")


def _partners(tokenizer: object, split: str) -> dict[str, tuple[str, ...]]:
    """Every usable country, with those that can replace it: as many tokens, and a capital of a single token."""
    table = CAPITALS[split]
    good = set(single_tokens(tokenizer, list(table.values()), LEAST_COUNTRIES, "capitals"))
    size = {country: _tokens(tokenizer, country) for country, capital in table.items() if capital in good}
    partners = {c: tuple(o for o in size if o != c and size[o] == size[c] != 0) for c in size}
    usable = {country: others for country, others in partners.items() if others}
    if len(usable) < LEAST_COUNTRIES:
        raise too_few(len(usable), len(table), LEAST_COUNTRIES, "countries (with a partner of equal length, a capital)")
    return usable


def _tokens(tokenizer: object, country: str) -> int:
    return len(continuation(tokenizer, "and", f" {country}") or ())


def _rows(split: str, partners: Mapping[str, Sequence[str]], n: int, seed: int) -> list[Row]:
    draw = generator_for("capitals", split, seed)
    table = CAPITALS[split]
    countries, others = BalancedSampler(tuple(partners), draw), BalancedSampler(tuple(partners), draw)
    seen: defaultdict[str, set[str]] = defaultdict(set)
    rows = []
    for _, frame in zip(range(n), cycle(shuffled(FRAMES[split], draw)), strict=False):
        # Not twice in one frame: the prompt would be the same.
        country = countries.draw(exclude=seen[frame])
        seen[frame].add(country)
        other = others.draw(only=partners[country])
        rows.append(
            Row(
                clean=frame.format(country=country),
                corrupted=frame.format(country=other),
                answer=f" {table[country]}",
                distractor=f" {table[other]}",
                groups={"template": frame.strip(), "names": country},
                split=split,
            )
        )
    return rows
