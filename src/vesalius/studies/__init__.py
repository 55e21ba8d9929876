"""Whole stories: from a question to tested claims."""

from __future__ import annotations

from vesalius.studies.answer import sentences, supported_roles
from vesalius.studies.calibrate import Calibration, calibrate
from vesalius.studies.control import claims_on
from vesalius.studies.question import Question, check_question, question_for
from vesalius.studies.summary import claim_row, summarise
from vesalius.studies.task_circuit import Options, Study, run_study

__all__ = [
    "Calibration",
    "Options",
    "Question",
    "Study",
    "calibrate",
    "check_question",
    "claim_row",
    "claims_on",
    "question_for",
    "run_study",
    "sentences",
    "summarise",
    "supported_roles",
]
