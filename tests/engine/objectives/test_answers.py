"""Numbers and terms in texts, by hand."""

from fractions import Fraction

import pytest

from engine.objectives.reinforcement.answers import equal_terms, final_answer, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("there are 12, then 7.", 7),
        ("1,234,567.5 in all", Fraction("1234567.5")),
        ("7-5", 5),
        ("x = -5", -5),
        ("(-5)", -5),
        ("2e-3", Fraction(2, 1000)),
        ("about .5", Fraction(1, 2)),
        ("3/4 of it", Fraction(3, 4)),
        ("$42.", 42),
        ("1/0", None),
        ("abc123", None),
        ("none", None),
        ("9" * 101, None),
        ("4 and 1/0", 4),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("6 * 7 = 42\n#### 42", "42"),
        ("The answer is 5.", "5"),
        ("Answer: $x^2$", "x^2"),
        (r"We get $a$, hence \(b + 1\).", "b + 1"),
        ("first\nsecond\n", "second"),
        ("", ""),
        (r"\boxed{never closed", "never closed"),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("term", "other"),
    [
        ("0.5", r"\frac{1}{2}"),
        (r"\frac12", r"\dfrac{1}{2}"),
        ("1,000", "1000"),
        ("50%", "50"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\sqrt{\frac{4}{9}}", "2/3"),
        (r"\sqrt[3]{8}", "2"),
        (r"3\frac{1}{2}", "7/2"),
        (r"-3\frac{1}{2}", "-3.5"),
        ("2^10", "1024"),
        ("2^{-2}", "0.25"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"(\frac{1}{2}, 4)", "(0.5, 2^2)"),
        (r"\{3, 1, 2\}", r"\{1,2,3\}"),
        ("x = 5", "5"),
        ("x^2 + 1", "x^2+1"),
        (r"\text{Paris}", "Paris"),
        (r"1.2\times 10^{3}", "1200"),
        (r"\frac{\pi}{2}", r"0.5\pi"),
        ("(1+2)(3)", "9"),
        ("6 / 4", "1.5"),
        ("1e3", "1000"),
    ],
)
def test_equal_terms(term, other):
    assert equal_terms(term, other) and equal_terms(other, term)


@pytest.mark.parametrize(
    ("term", "other"),
    [
        ("0.5", "0.51"),
        ("x", "y"),
        ("", ""),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(1,2,3)"),
        ("(1,2)", "3"),
        (r"\{1,1\}", r"\{1,2\}"),
        ("1/0", "1"),
        ("9^9^9^9^9^9", "1"),
        ("(" * 150, "1"),
        ("1" * 300, "1"),
        (r"\sqrt{-1}", "1"),
        ("__import__('os')", "1"),
        ("1e999", "1"),
    ],
)
def test_unequal_terms(term, other):
    assert not equal_terms(term, other) and not equal_terms(other, term)
