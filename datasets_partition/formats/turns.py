"""Turns as users keep them (OpenAI, ShareGPT, Glaive, TRL), the canonical turn of each, and what stands beside them."""

import json
from collections.abc import Collection
from typing import Any

from datasets_partition.formats.rows import BadRow, Row, kind_of

Turn = dict[str, Any]
PLAIN = {"role", "content"}
ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = "function_call"  # a turn that is a tool call as JSON text
ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "chatbot"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython", "tool_response", "function_response"), "tool"),
    "tool_call": CALL,
}
JSON_TURNS = ("messages", "conversations")  # columns whose text can only be JSON
WEIGHTS = ("weight", "loss_weight", "train", "training", "loss", "learned")
REASONING = ("reasoning_content", "thinking", "reasoning")
PASSED = (*REASONING, "tool_calls", "tool_call_id", "name")  # read by chat templates
TEXT_PARTS = ("text", "input_text", "output_text")


def opened(name: str, value: Any, leave_out: Collection[str] = ()) -> Any:
    """The value of the column `name` with its turns as a list of objects, without the keys to `leave_out`.

    Turns may be JSON text, or a struct of lists, as Hugging Face's datasets keep a sequence of features.
    """
    if name in JSON_TURNS and isinstance(value, str):
        value = parsed(value) if value.lstrip().startswith("[") else value
    if isinstance(value, dict) and _are_columns([*value.values()]):
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not (leave_out or any(isinstance(turn, str) for turn in value)):
        return value
    each = [parsed(turn) if isinstance(turn, str) else turn for turn in value]  # as datasets' Json
    return [
        {key: turn[key] for key in turn if key not in leave_out} if isinstance(turn, dict) else turn for turn in each
    ]


def _are_columns(values: list[Any]) -> bool:
    return all(isinstance(each, list) for each in values) and len({len(each) for each in values}) == 1


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null: Arrow gives all objects of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def turns(row: Row, name: str) -> list[Turn]:
    """The conversation in the column `name` as canonical turns. Raises BadRow if it is something else."""
    value = row[name]
    if value is None:
        raise BadRow(f"has null {name}")
    if not isinstance(value, list):
        raise BadRow(f"has no list of turns as its {name}", f"it is {kind_of(value)}; text must be JSON of such a list")
    if not value:
        raise BadRow(f"has empty {name}")
    return [_turn(turn, f"has a turn in its {name}") for turn in value]


def _turn(turn: Any, has: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"{has} that is no object with role and content", f"it is {kind_of(turn)}")
    if turn.keys() == PLAIN and isinstance(turn["content"], str) and turn["role"] in ROLES:
        return turn  # as most are
    left = {key: value for key, value in turn.items() if value is not None}
    if "more" in left:
        left |= _object(left.pop("more"), has)  # a canonical turn, as stores hold it
    role = _role(left.pop("role" if "role" in left else "from", None), has)
    content = left.pop("content" if "content" in left else "value", None)
    learned = _learned(left, role, has)
    more = _more(left, has)
    if role == CALL:
        role, content, more = "assistant", None, {"tool_calls": _calls(content, has), **more}
    if isinstance(content, list):
        content = _joined(content, has)
    if content is None and more.keys() & {"tool_calls", *REASONING}:
        more = {"content": None, **more}
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{has} whose content is no text", f"it is {kind_of(content)}")
    canonical: Turn = {"role": role, "content": content}
    if not learned and role == "assistant":
        canonical["learned"] = False
    return canonical | ({"more": json.dumps(more, ensure_ascii=False)} if more else {})


def _object(text: Any, has: str) -> Turn:
    value = parsed(text) if isinstance(text, str) else text
    if not isinstance(value, dict):
        raise BadRow(f"{has} with the key 'more', which is not read", f"leave it out with {leaving_out('more')}")
    return value


def _role(role: Any, has: str) -> str:
    known = role.strip().lower() if isinstance(role, str) else role
    known = ALIASES.get(known, known) if isinstance(known, str) else known
    if known not in (*ROLES, CALL):
        others = ", ".join(sorted({*ALIASES, CALL}))
        raise BadRow(
            f"{has} whose role is none of {', '.join(ROLES)}", f"it is {role!r}; others that are read: {others}"
        )
    return str(known)


def _learned(left: Turn, role: str, has: str) -> bool:
    """Whether the turn is to be learned; takes its keys out of `left`."""
    flags = {key: left.pop(key) for key in WEIGHTS if key in left}
    for key, value in flags.items():
        if value not in (0, 1):
            raise BadRow(f"{has} whose {key} is neither 0 nor 1", f"it is {value!r}")
        if value and role not in ("assistant", CALL):
            why = f"only the assistant's turns can be; leave the key out with {leaving_out(key)}"
            raise BadRow(f"{has} of the role {role} that {key} = {value!r} asks to learn", why)
    return all(flags.values())


def _more(left: Turn, has: str) -> Turn:
    """The keys that chat templates read beside role and content."""
    more: Turn = {}
    for key, value in left.items():
        if key == "function_call":
            more["tool_calls"] = _calls(value, has)
        elif key == "tool_calls":
            if value not in ([], "", "[]"):
                more[key] = _calls(value, has)
        elif key in PASSED:
            if not isinstance(value, str):
                raise BadRow(f"{has} whose {key} is no text", f"it is {kind_of(value)}")
            if value or key in REASONING:
                more[key] = value
        elif value not in ("", [], {}):
            raise BadRow(f"{has} with the key {key!r}, which is not read", f"leave it out with {leaving_out(key)}")
    return more


def leaving_out(key: str) -> str:
    """The recipe's key that lets a key of turns, or a column beside them, be unread."""
    return f"data.source.leave_out = {json.dumps([key])}"


def _joined(parts: list[Any], has: str) -> str:
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadRow(f"{has} with a part of its content that is no text", f"it is of the type {kind}")
        rest = [key for key, value in part.items() if key not in ("type", "text") and value not in (None, "", [], {})]
        if rest:
            raise BadRow(f"{has} with a part of its content that has the key {rest[0]!r}, which is not read")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, has: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with arguments as objects, as chat templates expect them."""
    value = parsed(value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    return [_call(parsed(call) if isinstance(call, str) else call, has) for call in calls]


def _call(call: Any, has: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    function = parsed(function) if isinstance(function, str) else function
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{has} with a tool call that is no object with name and arguments", f"it is {kind_of(call)}")
    around = call if "function" in call else {}
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else parsed(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise BadRow(f"{has} with a tool call whose arguments are no JSON object")
    inner = {"name", "arguments"} if around else {"name", "arguments", "id", "type", "index"}
    known = [*(around.keys() - {"function", "id", "type", "index"}), *(function.keys() - inner)]
    if unread := [key for key in known if {**around, **function}[key] not in (None, "", [], {})]:
        raise BadRow(f"{has} with a tool call that has the key {unread[0]!r}, which is not read")
    if (around or function).get("type", "function") != "function":
        raise BadRow(f"{has} with a tool call of the type {(around or function)['type']!r}, not function")
    call_id = (around or function).get("id")
    named = {} if call_id in (None, "") else {"id": call_id}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def options(row: Row, name: str) -> dict[str, Any]:
    """What the template takes beside the turns in the column `name`: tools, and TRL's chat_template_kwargs."""
    kwargs: dict[str, Any] = {}
    for key in ("template_options", "chat_template_kwargs"):
        value = row.get(key)
        value = parsed(value) if isinstance(value, str) and value else value
        if value and not isinstance(value, dict):
            raise BadRow(f"has {key} beside its {name} that are no JSON object", f"it is {kind_of(value)}")
        kwargs |= value or {}
    for key in ("tools", "functions"):
        if value := _tools(row.get(key), f"has {key} beside its {name}"):
            kwargs["tools"] = value
    return kwargs


def _tools(value: Any, has: str) -> list[dict[str, Any]]:
    value = parsed(value) if isinstance(value, str) and value.strip() else value
    listed = value if isinstance(value, list) else [value] if value else []
    tools = [parsed(tool) if isinstance(tool, str) else tool for tool in listed]
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"{has} that are no JSON objects with names", f"{json.dumps(tool, default=str)[:60]}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def parsed(text: str) -> Any:
    """The value of JSON text; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
