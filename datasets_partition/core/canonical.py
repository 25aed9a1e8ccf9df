"""The canonical tables that every source gives. A table has one format; its content columns say which.

    prompt_completion      prompt, completion             strings; the prompt of plain text is empty
    messages               messages                       a list of turns, each with its role and content
    preference             prompt, chosen, rejected       strings, or lists of turns
    unpaired_preference    prompt, completion, label      strings, or lists of turns; a boolean: is it a good completion
    prompt_only            prompt                         a string, or a list of turns

Beside them a table may have `client`, a string, and any other column by which rows can be partitioned.
"""

import pyarrow as pa

PROMPT_COMPLETION = "prompt_completion"
MESSAGES = "messages"
PREFERENCE = "preference"
UNPAIRED_PREFERENCE = "unpaired_preference"
PROMPT_ONLY = "prompt_only"

# In the order in which a table's columns are compared with them.
COLUMNS = {
    PREFERENCE: ("prompt", "chosen", "rejected"),
    MESSAGES: ("messages",),
    UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
    PROMPT_COMPLETION: ("prompt", "completion"),
    PROMPT_ONLY: ("prompt",),
}

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def format_of(table: pa.Table) -> str:
    """The format of a canonical table, a key of COLUMNS. Raises ValueError if it is none."""
    names = set(table.column_names)
    for name, columns in COLUMNS.items():
        # A label that is no boolean is a category, by which rows can be partitioned.
        if names.issuperset(columns) and (
            name != UNPAIRED_PREFERENCE or table.schema.field("label").type == pa.bool_()
        ):
            return name
    known = "; ".join(", ".join(columns) for columns in COLUMNS.values())
    raise ValueError(
        f"the source gives the columns {', '.join(table.column_names)}, which make no format: the formats are {known}"
    )


def content_columns(table: pa.Table) -> tuple[str, ...]:
    """What a row is, as against whose it is: two rows that agree on these columns are the same row."""
    return COLUMNS[format_of(table)]
