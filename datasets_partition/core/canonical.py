"""The canonical tables that every source returns. A table has one format; its content columns say which.

    prompt_completion      prompt, completion             strings; the prompt of plain text is empty
    messages               messages                       a list of turns, each with its role and content
    preference             prompt, chosen, rejected       strings, or lists of turns
    unpaired_preference    prompt, completion, label      strings, or lists of turns; true for a good completion
    prompt_only            prompt                         a string, or a list of turns

A table may also have `client`, a string, and any other column by which rows can be partitioned.
"""

import pyarrow as pa

from datasets_partition.core.errors import DataError

PROMPT_COMPLETION = "prompt_completion"
MESSAGES = "messages"
PREFERENCE = "preference"
UNPAIRED_PREFERENCE = "unpaired_preference"
PROMPT_ONLY = "prompt_only"

# A table's columns are compared with the formats in this order.
COLUMNS = {
    PREFERENCE: ("prompt", "chosen", "rejected"),
    MESSAGES: ("messages",),
    UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
    PROMPT_COMPLETION: ("prompt", "completion"),
    PROMPT_ONLY: ("prompt",),
}

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def format_of(table: pa.Table) -> str:
    """The format of a canonical table, a key of COLUMNS. Raises DataError if its columns make none."""
    names = set(table.column_names)
    for name, columns in COLUMNS.items():
        # A label that is not boolean is a category, by which rows can be partitioned.
        if names.issuperset(columns) and (
            name != UNPAIRED_PREFERENCE or table.schema.field("label").type == pa.bool_()
        ):
            return name
    known = "; ".join(", ".join(columns) for columns in COLUMNS.values())
    raise DataError(
        f"the source gives the columns {', '.join(table.column_names)}, which make no format: the formats are {known}"
    )


def content_columns(table: pa.Table) -> tuple[str, ...]:
    """The columns that make up a row's content: two rows that agree on them are duplicates."""
    return COLUMNS[format_of(table)]
