"""Claims that can fail: files of claims about a model, tests that could refute them, and what stands."""

from circuits.claims.catalogue import KINDS, TESTS
from circuits.claims.claim import CircuitSpec, Claim, ClaimFile
from circuits.claims.evidence import Known, Mean, Ratio, Region, Share
from circuits.claims.files import claims_schema, read_claims, write_claims
from circuits.claims.verdicts import Measured, Quantity, exit_code
from circuits.claims.verifying import Judged, Report, verify
from circuits.tasks.spec import TaskSpec

__all__ = [
    "KINDS",
    "TESTS",
    "CircuitSpec",
    "Claim",
    "ClaimFile",
    "Judged",
    "Known",
    "Mean",
    "Measured",
    "Quantity",
    "Ratio",
    "Region",
    "Report",
    "Share",
    "TaskSpec",
    "claims_schema",
    "exit_code",
    "read_claims",
    "verify",
    "write_claims",
]
