"""The part of the summary's schema that is about claims: what was claimed, what was measured, what was decided."""

from __future__ import annotations

from vesalius.report.nodes import Items, Object, flag, number, numbers, text, whole

VERDICTS = ("SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE")
"""In the order in which the page lists them: an effect that the controls share is no failure, and no finding either."""

CLAIM = Object(
    {
        "id": text("content hash"),
        "statement": text("what is claimed"),
        "measured": text("what was tested, with the threshold, and what validation measured; in words"),
        "component": text("name of the part it is about", null=True),
        "role": text("role it follows from", null=True),
        "kind": text("kind of claim: predictive, causal, ..."),
        "quantity": text("name of what was measured"),
        "verdict": text("computed from the evidence", one_of=VERDICTS),
        "reason": text(
            "of REFUTED: absent, opposite, too_small, not_specific; of INCONCLUSIVE: unmeasured, n_too_small, ...",
            null=True,
        ),
        "estimate": number("mean effect on validation"),
        "interval": Items(number(), "95 % interval", null=True, length=2),
        "low": number("its lower end"),
        "high": number("its upper end"),
        "discovery": number("the estimate on discovery, from which the claim was made; no evidence for it"),
        "unit": text("unit of estimate, interval, discovery, delta and values"),
        "delta": number("smallest effect worth claiming"),
        "delta_c": number("margin over the control"),
        "control": text("what the matched control is", null=True),
        "control_estimate": number("its mean effect"),
        "n": whole("examples"),
        "n_groups": whole("groups of examples (templates)"),
        "p": number("p-value of the verdict's side"),
        "p_holm": number("adjusted over the family"),
        "n_to_decide": whole("examples that would decide, if undecided", null=True),
        "scope": text('"general", or what the verdict is limited to'),
        "condition": Object(
            {
                "corruption": text("corruption", null=True),
                "direction": text("noising or denoising", null=True),
                "effect": text("total or direct", null=True),
            },
            "under which it was tested",
            null=True,
        ),
        "values": numbers("effect per example"),
        "control_values": numbers("control per example", null=True),
        "templates": Items(text(""), "template per example; empty when there are none"),
        "exploratory": flag("registered after its data had been opened"),
    }
)

PER_TEXT = ("values", "control_values", "templates")
"""Fields of a claim that hold one entry per example."""
LEG = Object(
    {
        "name": text("effect, control, or the name of a null"),
        "theta": number("how far its mean lies past the margin that was declared, in the claim's unit"),
        "p": number("p-value of its being past it"),
    }
)
EXPLAINED_CLAIM = Object(
    {
        **{name: node for name, node in CLAIM.fields.items() if name not in PER_TEXT},
        "legs": Items(LEG, "of the verdict"),
    }
)
"""A claim about one of thousands of parts: what is one number per text stays in the ledger."""

FAMILY = Object(
    {"id": text("content hash"), "m": whole("claims corrected for")},
    "all claims of the study, sealed before validation was opened; null when there are none",
    null=True,
)
