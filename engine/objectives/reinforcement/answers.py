r"""The value of an answer in a text: a number, or a term of LaTeX. Nothing that a text says is run.

Fractions are exact. A term whose value is irrational, such as 2\sqrt{3}, has that of floating point numbers.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction

Value = Fraction | float
LONGEST = 200  # characters of a term: longer ones are compared as text
MOST_BITS = 4096  # of a power
CLOSE = 1e-9  # relative, of irrational values
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"  # in 7-5 the minus is no sign
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d{1,100})(?!\d)(?:\.\d{1,100})?|\.\d{1,100})(?:[eE][-+]?\d{1,3})?(?:/\d{1,100})?"
)
DECIMAL = re.compile(r"(?:\d{1,100}(?:\.\d{1,100})?|\.\d{1,100})(?:[eE][-+]?\d{1,3})?")
THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
PHRASE = re.compile(r"(?:####|\banswer\b[^\n.:=]{0,40}?(?:\bis\b|:|=))\s*([^\n]+)", re.IGNORECASE)
DISPLAYED = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# What changes how a term looks, and not what it is.
LAYOUT = re.compile(
    r"\\(?:left|right|big|Big|displaystyle|limits)(?![a-zA-Z])|\\[,;:!> ]|\\quad|~|\s+|\\?[$%]|\^?\{?\\circ\}?"
)
UNIT = re.compile(r"(?<=[\d}])\\(?:text|mathrm|mbox)\{[^{}]*\}$")
STYLE = re.compile(r"\\(?:text|mathrm|mathbf|mathit|mbox|boxed)\{([^{}]*)\}")
SPELLINGS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cdot": "*",
    "\\times": "*",
    "\\div": "/",
    "\\{": "{",
    "\\}": "}",
}
CONSTANTS = {"\\pi": math.pi}


def last_number(text: str) -> Fraction | None:
    """Returns the last number of a text: 42, -1,234.5, 2e-3 or 3/4; None if there is none."""
    for match in reversed(list(NUMBER.finditer(text))):
        number, _, denominator = match.group().replace(",", "").partition("/")
        if not denominator or int(denominator):
            return Fraction(number) / int(denominator or 1)
    return None


def final_answer(text: str) -> str:
    r"""Returns the part of a text that states the answer.

    It is the last \boxed{...}; else what follows the last "####" or "answer is" in its line; else the last formula
    between dollar signs, \(...\) or \[...\]; else the last line.
    """
    if (start := text.rfind("\\boxed{")) >= 0:
        return _braced(text, start + len("\\boxed"))[0]
    if phrases := PHRASE.findall(text):
        text = phrases[-1]
    if formulas := DISPLAYED.findall(text):
        return str(max(formulas[-1], key=len))
    lines = text.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""


def equal_terms(term: str, other: str) -> bool:
    r"""Returns whether two terms are equal: by value, or else, as with variables, by what is written.

    Terms are sums, products, quotients, powers and roots of numbers (also mixed ones, 3\frac{1}{2}) and pi, in LaTeX
    or plain. Of an equation the right side counts. Percent and dollar signs, degrees, and units in \text are left out.
    Lists in brackets are compared one by one, sets in braces in any order.
    """
    first, second = plain_term(term), plain_term(other)
    if first == second:
        return first != ""
    parts, others = _items(first), _items(second)
    if parts is not None or others is not None:
        if parts is None or others is None or parts[0] != others[0] or len(parts[1]) != len(others[1]):
            return False
        (bracket, items), rest = parts, [*others[1]]
        if bracket != "{":
            return all(map(equal_terms, items, rest))
        for item in items:
            place = next((i for i, candidate in enumerate(rest) if equal_terms(item, candidate)), None)
            if place is None:
                return False
            del rest[place]
        return True
    value, expected = value_of(first), value_of(second)
    if value is None or expected is None:
        return False
    if isinstance(value, Fraction) and isinstance(expected, Fraction):
        return value == expected
    return math.isclose(value, expected, rel_tol=CLOSE)


def plain_term(text: str) -> str:
    """Returns a term without layout and units, the right side of an equation."""
    text = LAYOUT.sub("", text)
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = STYLE.sub(r"\1", UNIT.sub("", text)).rstrip(".")
    if text[:1] not in ("(", "[", "{"):
        text = THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return text.rpartition("=")[2]


def value_of(term: str) -> Value | None:
    """Returns the value of a term from `plain_term`; None if it has none or is too long."""
    if len(term) > LONGEST:
        return None
    try:
        value, rest = _sum(term)
        return value if rest == "" and math.isfinite(value) else None
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _items(term: str) -> tuple[str, list[str]] | None:
    """Returns the opening bracket of a list in brackets, and what is between its commas; None for anything else."""
    if len(term) < 2 or term[0] + term[-1] not in ("()", "[]", "{}", "(]", "[)"):
        return None
    items = list(_split(term[1:-1]))
    bracket = "{" if term[0] == "{" else term[0] + term[-1]  # of intervals both ends count
    return (bracket, items) if len(items) > 1 else None


def _split(text: str) -> Iterator[str]:
    """Yields what is between commas outside of brackets."""
    depth, start = 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _sum(text: str) -> tuple[Value, str]:
    """Reads a sum; returns its value and the rest of the text, as all functions below."""
    value, text = _product(text)
    while text[:1] in ("+", "-") and text:
        term, rest = _product(text[1:])
        value, text = (value + term if text[0] == "+" else value - term), rest
    return value, text


def _product(text: str) -> tuple[Value, str]:
    value, text = _signed(text)
    while text:
        if text[0] in "*/":
            factor, rest = _signed(text[1:])
            value, text = (value * factor if text[0] == "*" else value / factor), rest
        elif text.startswith("\\frac") and isinstance(value, Fraction) and value.denominator == 1:  # a mixed number
            part, text = _atom(text)
            value += part if value >= 0 else -part
        elif text[0] in "(\\":  # a product without a sign
            factor, text = _power(text)
            value *= factor
        else:
            break
    return value, text


def _signed(text: str) -> tuple[Value, str]:
    if text[:1] in ("+", "-") and text:
        value, rest = _signed(text[1:])
        return (-value if text[0] == "-" else value), rest
    return _power(text)


def _power(text: str) -> tuple[Value, str]:
    value, text = _atom(text)
    if text[:1] != "^":
        return value, text
    exponent, text = (_atom if text[1:2].isdecimal() else _argument)(text[1:])
    return _raised(value, exponent), text


def _raised(value: Value, exponent: Value) -> Value:
    if isinstance(value, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits * abs(exponent.numerator) > MOST_BITS:
            raise ValueError("a power of too many digits")
        exact: Fraction = value**exponent.numerator
        return exact
    power = float(value) ** float(exponent)
    if isinstance(power, complex):
        raise ValueError("a root of a negative number")
    return power


def _atom(text: str) -> tuple[Value, str]:
    if match := DECIMAL.match(text):
        return Fraction(match.group()), text[match.end() :]
    if text[:1] == "(":
        value, rest = _sum(text[1:])
        if rest[:1] != ")":
            raise ValueError("a bracket that nothing closes")
        return value, rest[1:]
    if text[:1] == "{":
        inner, rest = _braced(text, 0)
        return _whole(inner), rest
    if text.startswith("\\frac"):
        above, rest = _argument(text[len("\\frac") :])
        below, rest = _argument(rest)
        return above / below, rest
    if text.startswith("\\sqrt"):
        return _root(text[len("\\sqrt") :])
    for name, constant in CONSTANTS.items():
        if text.startswith(name):
            return constant, text[len(name) :]
    raise ValueError("no term")


def _root(text: str) -> tuple[Value, str]:
    """Reads a root's degree in brackets, if any, and its argument; the root of a square is exact."""
    degree = Fraction(2)
    if text[:1] == "[":
        inside, _, text = text[1:].partition("]")
        degree = Fraction(inside)
    value, rest = _argument(text)
    if degree == 2 and isinstance(value, Fraction) and value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root, rest
    return _raised(value, 1 / degree), rest


def _argument(text: str) -> tuple[Value, str]:
    """Reads what a command of LaTeX takes: a group in braces, or a single digit or command."""
    if text[:1] == "{":
        inner, rest = _braced(text, 0)
        return _whole(inner), rest
    if text[:1].isdecimal():
        return Fraction(text[0]), text[1:]
    return _signed(text)


def _whole(text: str) -> Value:
    value, rest = _sum(text)
    if rest:
        raise ValueError("more than a term")
    return value


def _braced(text: str, start: int) -> tuple[str, str]:
    """Returns what is inside the braces that open at `start`, and what follows them."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + 1 : place], text[place + 1 :]
    return text[start + 1 :], ""
