"""What a probe's score is compared with: without the model, without the concept, without training, and in bits.

Control tasks and selectivity: Hewitt and Liang 2019 (arXiv:1909.03368, section 2). Codelength: the online code of Voita
and Titov 2020 (arXiv:2003.12298, section 3.2). Random weights: Zhang and Bowman 2018 (arXiv:1809.10040).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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

    The first block is sent at log2(classes) bits a label, which is what all would take: 1 is no compression, and labels
    that cannot be foretold take a few bits more. targets: other numbers of classes, [example].
    """
    concept, (some, _, examples) = rows.concept, of_split(rows, DISCOVERY)
    classes = (_targets(concept) if targets is None else targets)[examples]
    groups = [concept.groups[example] for example in examples]
    order = np.array(_by_group(groups, seed))
    count = len(concept.classes)
    lengths = np.zeros(len(_TEMPERATURES))
    ends = sorted({max(4, round(share * len(order))) for share in BLOCKS})
    values = rows[site][some]
    for start, end in zip([0, *ends], ends, strict=False):
        seen, block = order[:start], order[start:end]
        scores = None
        if len(set(classes[seen].tolist())) == count:
            scores = _probed(kind, values, classes, [groups[one] for one in seen], seen, block, seed)
        if scores is None:
            lengths += (end - start) * np.log2(count)
            continue
        lengths += [
            -np.log2(_mixed(one * scores)[np.arange(len(block)), classes[block]]).sum() for one in _TEMPERATURES
        ]
    # A mixture of the temperatures: it is longer than the best of them by log2 of their number at most.
    bits = float(lengths.min() - np.log2(np.mean(2.0 ** (lengths.min() - lengths))))
    return Control("how many times shorter a code of the labels is", len(order) * float(np.log2(count)) / bits)


def _by_group(groups: Sequence[str], seed: int) -> list[int]:
    """Examples in random order of their groups, so that what is sent next was not seen in another form."""
    rank = {name: int(n) for name, n in
            zip(dict.fromkeys(groups), random_order(len(set(groups)), "codelength", seed), strict=True)}  # fmt: skip
    return sorted(range(len(groups)), key=lambda number: (rank[groups[number]], number))


def _probed(
    kind: str, values: Any, classes: Numbers, groups: Sequence[str], seen: Numbers, block: Numbers, seed: int
) -> Floats | None:
    """Scores of a block by a probe of what was seen before; None where that is too little to fit one."""
    try:
        return fit_readout(kind, values[seen], classes[seen], groups, None, seed).scores(values[block])
    except InputError:
        return None


_TEMPERATURES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors on a probe's scores: it may be too sure, or not sure enough."""


def _mixed(scores: Floats) -> Floats:
    """Probabilities, with a thousandth of the uniform distribution."""
    found = probabilities_of(scores)
    return 0.999 * found + 0.001 / found.shape[1]
