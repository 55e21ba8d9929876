"""What a probe's score is compared with: without the model, without the concept, without training, and in bits.

Control tasks and selectivity: Hewitt and Liang 2019 (arXiv:1909.03368, section 2). Codelength: the online code of Voita
and Titov 2020 (arXiv:2003.12298, section 3.2). Random weights: Zhang and Bowman 2018 (arXiv:1809.10040).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vesalius.concepts.classifier import logistic, words_counted
from vesalius.concepts.concept import DISCOVERY, VALIDATION, Concept
from vesalius.concepts.probe import Control, Probe, of_split, predicted_of, probabilities_of, score_each
from vesalius.concepts.reading import Rows
from vesalius.concepts.readings import random_order
from vesalius.concepts.readouts import Floats, Numbers, Planes, Readout, fit_readout
from vesalius.concepts.scores import share_of
from vesalius.errors import InputError
from vesalius.site import Site

BLOCKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the examples that have been sent when a probe is fitted anew."""
MOST_WORDS = 4000
"""Examples that a bag of words is fitted to, at most."""


def without_model(concept: Concept) -> dict[str, Control]:
    """The commonest label, and of whole texts a bag of words; of numbers nothing."""
    if concept.continuous:
        return {}
    labels = np.array(concept.labels)
    train, test = concept.rows(DISCOVERY), concept.rows(VALIDATION)
    commonest = Counter(labels[train].tolist()).most_common(1)[0][0]
    found = {
        "majority": Control(f"always {commonest!r}, the commonest label", float((labels[test] == commonest).mean()))
    }
    if not isinstance(concept.inputs, torch.Tensor) and not concept.spans:
        found["bag_of_words"] = _bag_of_words(concept, train[:MOST_WORDS], test)
    return found


def _bag_of_words(concept: Concept, train: Numbers, test: Numbers) -> Control:
    words = words_counted([concept.texts[row] for row in train], [concept.texts[row] for row in test])
    classes = concept.numbers.astype(int)
    planes = [logistic(words[0], classes[train] == label, tolerance=1e-3) for label in _outputs(concept)]
    return _control("a bag of words", concept, Planes.of(planes).scores(words[1]), test)


def _outputs(concept: Concept) -> Sequence[int]:
    return range(len(concept.classes)) if len(concept.classes) > 2 else [1]


def at_site(rows: Rows, random: Rows | None, probe: Probe, seed: int) -> dict[str, Control]:
    """Labels dealt out anew, and the same site of the network with random weights."""
    found = {"shuffled": _shuffled(rows, probe, seed)}
    if random is not None:
        words = "the same network with random weights"
        found["random_weights"] = _refitted(random, probe, seed, _targets(rows.concept), words)
    return found


def _targets(concept: Concept) -> Any:
    return concept.numbers if concept.continuous else concept.numbers.astype(np.intp)


def _shuffled(rows: Rows, probe: Probe, seed: int) -> Control:
    """Fitted to labels of other examples, and scored on the true ones."""
    targets, train = _targets(rows.concept).copy(), rows.concept.rows(DISCOVERY)
    targets[train] = targets[train][random_order(len(train), "shuffled", seed)]
    return _refitted(rows, probe, seed, targets, "fitted to labels dealt out anew", probe.readout)


def _refitted(rows: Rows, probe: Probe, seed: int, targets: Any, words: str, like: Readout | None = None) -> Control:
    concept, (some, place, examples) = rows.concept, of_split(rows, DISCOVERY)
    groups = [concept.groups[example] for example in examples]
    values = rows[probe.site]
    readout = fit_readout(probe.kind, values[some], targets[examples], groups, place, seed, like)
    mine, local, _ = of_split(rows, VALIDATION)
    return _control(words, concept, readout.scores(values[mine], local), concept.rows(VALIDATION))


def _control(words: str, concept: Concept, scores: Floats, test: Numbers) -> Control:
    each = score_each(predicted_of(scores, concept.classes), np.array(concept.labels, dtype=object)[test])
    found = share_of(words, each, [concept.groups[row] for row in test], share=not concept.continuous)
    return Control(words, found.estimate, found.low, found.high)


def costly(rows: Rows, probe: Probe, seed: int) -> dict[str, Control]:
    """The codelength, and, where examples have types that both splits share, a control task."""
    concept = rows.concept
    if concept.continuous or rows.at == "tokens":
        return {}
    found = {"compression": compression(rows, probe.site, probe.kind, seed)}
    if concept.types:
        task, selectivity = control_task(rows, probe, seed)
        found |= {"control_task": task, "selectivity": selectivity}
    return found


def control_task(rows: Rows, probe: Probe, seed: int = 0) -> tuple[Control, Control]:
    """Score of the same kind of probe for labels that were dealt out to types at random, and by how much the probe is
    better (selectivity). Both on validation, of types that discovery has: for others there is nothing to learn.
    """
    concept = rows.concept
    labels, types = concept.numbers.astype(np.intp), np.array(concept.types)
    names = list(dict.fromkeys(types.tolist()))
    # Types get labels in the proportions that examples have them, whatever their own.
    order = random_order(len(labels), "control task", seed)
    dealt = {name: labels[order[number % len(order)]] for number, name in enumerate(names)}
    targets = np.array([dealt[name] for name in types])
    some, place, examples = of_split(rows, DISCOVERY)
    known = np.isin(types, types[examples])
    groups = [concept.groups[example] for example in examples]
    readout = fit_readout(probe.kind, rows[probe.site][some], targets[examples], groups, place, seed)
    mine, local, test = of_split(rows, VALIDATION)
    kept, values = known[test], rows[probe.site][mine]
    predicted = [_classes(one.scores(values, local))[kept] for one in (readout, probe)]
    control = predicted[0] == targets[test][kept]
    own = predicted[1] == labels[test][kept]
    of = [concept.groups[row] for row in test[kept]]
    first = share_of("labels dealt out to types", control.astype(float), of)
    gap = share_of("selectivity", own.astype(float) - control, of, share=False)
    return (Control("labels dealt out to types at random", first.estimate, first.low, first.high),
            Control("selectivity: how much better than that", gap.estimate, gap.low, gap.high))  # fmt: skip


def _classes(scores: Floats) -> Numbers:
    return (scores[:, 0] > 0).astype(np.intp) if scores.shape[1] == 1 else scores.argmax(1)


def compression(rows: Rows, site: Site, kind: str = "logistic", seed: int = 0, *, targets: Any = None) -> Control:
    """How many times shorter the labels of discovery become when each block is sent by a probe of those before it.

    The first block is sent at log2(classes) bits a label, which is what all would take: 1 is no compression. targets:
    other numbers of classes, [example].
    """
    concept, (some, _, examples) = rows.concept, of_split(rows, DISCOVERY)
    classes = (_targets(concept) if targets is None else targets)[examples]
    groups = [concept.groups[example] for example in examples]
    order = np.array(_by_group(groups, seed))
    bits, each = 0.0, np.log2(len(concept.classes))
    ends = sorted({max(4, round(share * len(order))) for share in BLOCKS})
    values = rows[site][some]
    for start, end in zip([0, *ends], ends, strict=False):
        if start == 0 or len(set(classes[order[:start]].tolist())) < len(concept.classes):
            bits += (end - start) * each
            continue
        seen, block = order[:start], order[start:end]
        probabilities = _online(kind, values, classes, groups, seen, block, seed)
        bits -= float(np.log2(probabilities[np.arange(len(block)), classes[block]]).sum())
    return Control("how many times shorter a code of the labels is", len(order) * each / bits)


def _by_group(groups: Sequence[str], seed: int) -> list[int]:
    """Examples in random order of their groups, so that what is sent next was not seen in another form."""
    rank = {name: int(n) for name, n in
            zip(dict.fromkeys(groups), random_order(len(set(groups)), "codelength", seed), strict=True)}  # fmt: skip
    return sorted(range(len(groups)), key=lambda number: (rank[groups[number]], number))


def _online(
    kind: str, values: Any, classes: Numbers, groups: Sequence[str], seen: Numbers, block: Numbers, seed: int
) -> Floats:
    """Probabilities [example, class] of a block, from a probe of what was seen before."""

    def fit(some: Numbers) -> Readout:
        return fit_readout(kind, values[some], classes[some], [groups[one] for one in some], None, seed)

    # Scores are tempered on a part that is held out, so that being too sure is not paid for in bits.
    held = max(2, len(seen) // 4)
    first, last = seen[:-held], seen[-held:]
    factor = 0.0
    if len(set(classes[first].tolist())) == len(set(classes.tolist())):
        scores, own = _probed(fit, first, values[last]), classes[last]
        if scores is not None:
            factor = _tempered(scores, own)
    scores = _probed(fit, seen, values[block])
    outputs = 1 if len(set(classes.tolist())) == 2 else int(classes.max()) + 1
    return _mixed(np.zeros((len(block), outputs)) if scores is None else factor * scores)


def _tempered(scores: Floats, classes: Numbers) -> float:
    """The smallest factor on the scores whose code is longer than the best's by two standard errors at most."""
    cost = np.array([-np.log(_mixed(one * scores)[np.arange(len(classes)), classes]) for one in _TEMPERATURES])
    beyond = cost - cost[int(cost.sum(1).argmin())]
    error = beyond.std(1) / np.sqrt(len(classes))
    return _TEMPERATURES[int(np.argmax(beyond.mean(1) <= 2 * error))]


def _probed(fit: Callable[[Numbers], Readout], some: Numbers, rows: Any) -> Floats | None:
    """Scores of a probe of some examples; None where they are too few to fit one."""
    try:
        return fit(some).scores(rows)
    except InputError:
        return None


_TEMPERATURES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _mixed(scores: Floats) -> Floats:
    """Probabilities, with a thousandth of the uniform distribution."""
    found = probabilities_of(scores)
    return 0.999 * found + 0.001 / found.shape[1]
