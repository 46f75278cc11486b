"""What may stand behind a number and what may not, against a slow and simple second reading."""

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpo.rewards.number import LONGEST_TAIL, parse_number

NOT_PLAIN = [
    "5...",
    "0.333...",
    "1, 2, 3, ...",
    "3.14\u2026",
    "2\\pi",
    "[5,\\infty)",
    "[5, \\infty)",
    "3x",
    "2^{n}",
    "4<x",
    "5!",
    "2 \\text{ or } -2",
    "5 and a half",
    "12 hours 30 minutes",
    "5\\sqrt{3}",
    "2 ab",
    "3 x",
    "5 \\pm 2",
    "5 i",
    "5i",
    "2e",
    "3\\cdot 5",
    "5 or more",
    "5 \\text{ million}",
    "5\\text{ or }7",
    "5 apples or 6",
    "5 dollars and fifty cents",
    "5, x",
    "5, 7",
    "5; 7",
    "5:3",
    "(5,7)",
    "5 \\le x",
    "5+x",
    "5-x",
    "5 - x",
    "5/x",
    "5(x+1)",
    "5 (x+1)",
    "5_3",
    "5_{10}",
    "5\\%+2",
    "2\\times 3",
    "5 mod 7",
    "5 thirds",
    "5 squared",
    "5'3",
    "2θ",
    "2 π",
    "5√2",
    "5 \\div 2",
    "5|x",
    "2x",
    "5n!",
    "1/2",
    "5 hundred",
    "5 apples 3",
    "5 feet 3 inches",
    "3\\frac{1}{2}",
    "5 if x>0",
    "5 million",
    "5m n",
    "2 sqrt(3)",
    "4 < x",
    "5 ≤ x",
    "5 миллионов",
    "5萬",
    "5 тысяч",
    "2 = x + y",
    "2=3x",
    "5^\\circ 30'",
    "2\\text{ and }3",
    "5 \\text{ and a half}",
    "2\\mathrm{i}",
    "5 \\quad 7",
    "5\\\\7",
    "5 &7",
    "3,5",
    "1.234,5",
    "5 to 7",
    "1 in 4",
    "5 out of 7",
    "−-5",
    "5 choose 2",
    "2\\log 3",
    "2 log 3",
    "12%3",
    "5 x 3",
    "7 of 9",
]
PLAIN = {
    "5 (five)": "5",
    "«5»": "5",
    "5th": "5",
    "5 kr": "5",
    "5 \\checkmark": "5",
    "1\\ 000": "1000",
    "1\\,000": "1000",
    "1{,}000": "1000",
    "1,\\!000": "1000",
    "1 000": "1000",
    "10 000 000 dollars": "10000000",
    "5%": "5",
    "5\\%": "5",
    "5^\\circ": "5",
    "5^{\\circ}": "5",
    "5°C": "5",
    "5 °C": "5",
    "5^\\circ\\text{C}": "5",
    "5\\text{ cm}": "5",
    "5\\text{ cm}^2": "5",
    "5 \\text{ square units}": "5",
    "5\\text{ m/s}": "5",
    "5 m^2": "5",
    "5 m²": "5",
    "5 km/h": "5",
    "5kg": "5",
    "5 cm": "5",
    "$5": "5",
    "\\$5": "5",
    "US$5": "5",
    "5 dollars": "5",
    "€5": "5",
    "5€": "5",
    "5 EUR": "5",
    "USD 5": "5",
    "Rs. 5": "5",
    "5 apples.": "5",
    "**5**": "5",
    "**5** apples": "5",
    "**5 apples**": "5",
    "5 cats and dogs": "5",
    "5, which is 2 + 3": "5",
    "5 (about 3 a day)": "5",
    "5 apples (3 a day)": "5",
    "5 apples in 3 days": "5",
    "5.": "5",
    "5.**": "5",
    "5. So there": "5",
    "\\(5\\)": "5",
    "$5$": "5",
    "$5$.": "5",
    "$5$ apples": "5",
    "5个苹果": "5",
    "5 元": "5",
    "5 руб.": "5",
    "5 रुपये": "5",
    "5 تفاحات": "5",
    "5</answer>": "5",
    "5<|eot_id|>": "5",
    "5 a day": "5",
    "5 hours per day": "5",
    "5-year": "5",
    "5 mph": "5",
    "5\\mathrm{~km}": "5",
    "5\\ \\text{cm}": "5",
    "5~\\text{cm}": "5",
    "5\\,\\mathrm{cm}": "5",
    "`5`": "5",
    "(5)": "5",
    "5 |": "5",
    "5 apples!": "5",
    "**5**!": "5",
    "5 pm": "5",
    "5 p.m.": "5",
    "5 - the total": "5",
    "5 = 2 + 3": "5",
    "5 = 2 + 3 apples": "5",
    "5 ✅": "5",
    "5,因为": "5",
    "５（個）": "5",
    "\\displaystyle 5": "5",
    "5\\text{ (units)}": "5",
    "\\mathbf{5}": "5",
    "\\textbf{5}": "5",
    "5\\text{cm}^{3}": "5",
    "5 people.": "5",
    "5 de la tarde": "5",
    "-\\$5": "-5",
    "5 g": "5",
    "5m": "5",
    "5 one-way tickets": "5",
    "5 \\text{ days}.": "5",
    "5\\degree": "5",
    "5 units^2": "5",
    "5 days a week": "5",
    "5\\text{ hours per day}": "5",
    "5 ft.": "5",
    "5 Äpfel": "5",
    "5 años": "5",
    "5 euros": "5",
    "5 / day": "5",
    "5 per day": "5",
    "5 of them": "5",
}


@pytest.mark.parametrize("line", NOT_PLAIN)
def test_what_is_more_than_a_number(line: str) -> None:
    assert parse_number(line) is None


@pytest.mark.parametrize("line", PLAIN)
def test_what_leaves_a_number_alone(line: str) -> None:
    assert parse_number(line) == Decimal(PLAIN[line])


NUMBERS = {"42": "42", "-7": "-7", "1,234.50": "1234.5", "0": "0", "007": "7", ".5": "0.5", "1{,}000": "1000"}
"""As written, and their value."""
UNITS = [
    "apples",
    "km/h",
    "cm^2",
    "kg",
    "square units",
    "\\text{ days}",
    "руб",
    "\\text{cm}^3",
    "dollars per hour",
    "年",
]
SIGNS = ["%", "\\%", "$", "^\\circ", "°", "€"]
CLOSERS = ["", "**", ")", "}", "$", "\\)", "`", '"', "</b>"]
ENDS = ["", ".", " ", ".**", ". That is all, as 3 + 4 = 7.", ", which is 6 * 7", " (see 1)", "!", ";", " - as said"]
MORE = [
    "\\pi",
    "x",
    "^2",
    "^{n}",
    "\\sqrt{2}",
    "!",
    " or 7",
    "/2",
    ":30",
    " 1/2",
    "-7",
    " and a half",
    "e3",
    ",\\infty)",
]
MORE += [
    "<x",
    " \\text{ or } 7",
    " million",
    "k",
    " dozen",
    "\\times 3",
    " x",
    "+1",
    "_2",
    "²",
    "½",
    ", 7",
    "; 7",
    " n^2",
]
MORE += [
    "\\cdot 2",
    " \\pm 1",
    " mod 5",
    "(x+1)",
    " to 7",
    " minutes 30 seconds",
    " 万",
    "π",
    "i",
    "\\frac{1}{2}",
    "|y",
]


@given(st.sampled_from(sorted(NUMBERS)), st.sampled_from(["", *UNITS, *SIGNS]), st.sampled_from(CLOSERS), st.data())
def test_allowed_tails_in_any_combination(written: str, unit: str, closer: str, data: st.DataObject) -> None:
    space = " " if unit in UNITS else ""
    end = data.draw(st.sampled_from([end for end in ENDS if end != "!" or unit in UNITS]))
    assert parse_number(f"{written}{space}{unit}{closer}{end}") == Decimal(NUMBERS[written])


@given(st.sampled_from(sorted(NUMBERS)), st.sampled_from(MORE), st.sampled_from(["", *UNITS]), st.sampled_from(CLOSERS))
def test_what_goes_on_is_no_number_whatever_follows(written: str, more: str, unit: str, closer: str) -> None:
    assert parse_number(f"{written}{more}{closer}") is None
    assert parse_number(f"{written}{more} {unit}{closer}") is None


ALPHABET = "0123456789.,-+ $%^!/=<>()[]{}\\x*_aπ²½:;or"


def simple(line: str) -> set[str]:
    """Digits of what a line may at most be read as: its first run of digits, with what may stand between them."""
    start = next((place for place, char in enumerate(line) if char in "0123456789"), len(line))
    found, digits = set(), ""
    for char in line[start:]:
        if char in "0123456789":
            digits += char
            found.add(digits)
        elif char not in " ,.{}\\;:!":
            break
    return found


@given(st.text(ALPHABET, max_size=30))
@example("1,234 567")
@example("x 5")
def test_only_the_first_number_is_ever_read_and_whole(line: str) -> None:
    number = parse_number(line)
    if number is None:
        return
    assert f"{number.copy_abs():f}".replace(".", "").lstrip("0") in {digits.lstrip("0") for digits in simple(line)}
    assert (number < 0) <= ("-" in line)
    for more in ("0", "\\pi", "^2", "/2"):  # what is a number is none when more of it follows right behind
        plain = f"{number:f}"
        assert parse_number(plain) == number
        assert parse_number(plain + more) != number or (more == "0" and ("." in plain or number == 0))


def test_only_so_much_of_what_follows_is_looked_at() -> None:
    assert parse_number("42 " + "apples " * LONGEST_TAIL + "7") == 42
    assert parse_number("42 " + "apples " * 20 + "7") is None
