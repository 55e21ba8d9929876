"""Whole stories: from a question to tested claims."""

from __future__ import annotations

from vesalius.studies.answer import sentences, supported_roles
from vesalius.studies.by_design import ByDesign, by_design_question, run_by_design, summarise_by_design
from vesalius.studies.calibrate import Calibration, calibrate
from vesalius.studies.control import RANDOM_WEIGHTS, Controlled, claims_on, random_weights_control
from vesalius.studies.curves import CurveSearch, curve_search, find_curves, summarise_curves
from vesalius.studies.cytology import Shortcut, shortcut_question
from vesalius.studies.described_circuit import describe_members, summarise_members
from vesalius.studies.edge_circuit import summarise_edges
from vesalius.studies.explain import EXPLAIN, explain
from vesalius.studies.explained import Explained, Explanations, summarise_explained
from vesalius.studies.explaining import BASELINES, Explaining, explaining
from vesalius.studies.finding import FIND, Finding, find, finding, summarise_found, texts_with
from vesalius.studies.gate import Gate, gate
from vesalius.studies.heads import HEADS, DescribingHeads, describe_heads, describing_heads, summarise_heads
from vesalius.studies.probed import summarise_probed
from vesalius.studies.probing import (
    ABSENT,
    OPEN,
    PROBE,
    UNUSED,
    USED,
    Probing,
    probe,
    probing,
    said_of,
)
from vesalius.studies.question import Question, check_question, question_for
from vesalius.studies.representing import Represented, represented
from vesalius.studies.shortcut import run_shortcut
from vesalius.studies.shortcut_summary import summarise_shortcut
from vesalius.studies.study import Artefact, Options, Step, StoppedError, Study, Work, run_steps
from vesalius.studies.summary import claim_row, summarise
from vesalius.studies.task_circuit import TASK_CIRCUIT, run_study

__all__ = [
    "ABSENT",
    "BASELINES",
    "EXPLAIN",
    "FIND",
    "HEADS",
    "OPEN",
    "PROBE",
    "RANDOM_WEIGHTS",
    "TASK_CIRCUIT",
    "UNUSED",
    "USED",
    "Artefact",
    "ByDesign",
    "Calibration",
    "Controlled",
    "CurveSearch",
    "DescribingHeads",
    "Explained",
    "Explaining",
    "Explanations",
    "Finding",
    "Gate",
    "Options",
    "Probing",
    "Question",
    "Represented",
    "Shortcut",
    "Step",
    "StoppedError",
    "Study",
    "Work",
    "by_design_question",
    "calibrate",
    "check_question",
    "claim_row",
    "claims_on",
    "curve_search",
    "describe_heads",
    "describe_members",
    "describing_heads",
    "explain",
    "explaining",
    "find",
    "find_curves",
    "finding",
    "gate",
    "probe",
    "probing",
    "question_for",
    "random_weights_control",
    "represented",
    "run_by_design",
    "run_shortcut",
    "run_steps",
    "run_study",
    "said_of",
    "sentences",
    "shortcut_question",
    "summarise",
    "summarise_by_design",
    "summarise_curves",
    "summarise_edges",
    "summarise_explained",
    "summarise_found",
    "summarise_heads",
    "summarise_members",
    "summarise_probed",
    "summarise_shortcut",
    "supported_roles",
    "texts_with",
]
