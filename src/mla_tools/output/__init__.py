"""The folder of a conversion, from its first byte to the file that completes it.

While it is written, the shards have temporary names and journals say what of them is on disk for good. The
index comes last. So a folder is either complete or visibly unfinished, and one that was interrupted, by
whatever it was, can be resumed: what the journals do not name is done again, and as the bytes depend on
nothing but the plan, the result is the same.

A complete folder holds mla_tools.json: what made it from what, and the sha256 of each of its files.
"""

from mla_tools.output.folder import (
    begin,
    check_output,
    how_to_resume,
    how_to_start_again,
    is_complete,
    is_unfinished,
    refuse_source,
)
from mla_tools.output.journal import Journal, journals
from mla_tools.output.publishing import publish
from mla_tools.output.record import INDEX, RECORD, Record, begun, provenance
from mla_tools.output.writing import Output

__all__ = [
    "INDEX",
    "RECORD",
    "Journal",
    "Output",
    "Record",
    "begin",
    "begun",
    "check_output",
    "how_to_resume",
    "how_to_start_again",
    "is_complete",
    "is_unfinished",
    "journals",
    "provenance",
    "publish",
    "refuse_source",
]
