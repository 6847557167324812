"""Spelling a decimal number in the scripts that people write numbers in.

Every function takes the number as plain half-width text (``"-120.05"``) and returns its spelling. Integer parts have up
to 15 digits. Chinese numerals follow the place-value reading: one 零 for a gap inside a number (一千零一, 一万零一百),
none at the end, 十 and not 一十 at the front (十二, 十万, but 一百一十). The zero is 零 and never 〇, which is for
reading digits one by one, as in years. Decimals are read digit by digit after 点.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

CHINESE_DIGITS = "零一二三四五六七八九"
FORMAL_DIGITS = "零壹贰叁肆伍陆柒捌玖"
UNIT_SIZES = (10**8, 10**4, 1000, 100, 10)
FULL_WIDTH = str.maketrans("0123456789-.", "０１２３４５６７８９－．")
ENGLISH_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
ENGLISH_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ENGLISH_SCALES = ((10**12, " trillion"), (10**9, " billion"), (10**6, " million"), (10**3, " thousand"), (1, ""))


def _parts(number: str) -> tuple[bool, int, str]:
    """Whether the number is negative, its integer part, its decimal digits."""
    whole, _, fraction = number.lstrip("-").partition(".")
    if len(whole) > 15:
        raise ValueError(f"{number}: more than 15 integer digits")
    return number.startswith("-"), int(whole), fraction


@lru_cache(maxsize=65536)
def _chinese_whole(value: int, digits: str, units: str) -> str:
    """A positive integer: what is above the largest unit, the unit, 零 if there is a gap, and the rest."""
    if value < 10:
        return digits[value]
    size, unit = next((size, unit) for size, unit in zip(UNIT_SIZES, units, strict=True) if value >= size)
    high, low = divmod(value, size)
    text = _chinese_whole(high, digits, units) + unit
    if low == 0:
        return text
    return text + ("零" if low < size // 10 else "") + _chinese_whole(low, digits, units)


def _chinese(number: str, digits: str, units: str) -> str:
    negative, whole, fraction = _parts(number)
    text = _chinese_whole(whole, digits, units)
    if fraction:
        text += "点" + "".join(digits[int(digit)] for digit in fraction)
    return ("负" if negative else "") + text


def chinese(number: str) -> str:
    """一百二十三; 12 is 十二."""
    text = _chinese(number, CHINESE_DIGITS, "亿万千百十")
    for sign in ("", "负"):
        if text.startswith(sign + "一十"):
            return sign + text[len(sign) + 1 :]
    return text


def colloquial(number: str) -> str:
    """Chinese with 两 for a 2 that counts hundreds, thousands, 万 or 亿: 两千两百二十二, 两万; but 十二万."""
    whole, point, fraction = chinese(number).partition("点")
    for unit in "百千":
        whole = whole.replace("二" + unit, "两" + unit)
    sign = "负" if whole.startswith("负") else ""
    if whole.startswith((sign + "二万", sign + "二亿")):
        whole = sign + "两" + whole[len(sign) + 1 :]
    return whole + point + fraction


def formal(number: str) -> str:
    """Formal Chinese numerals, as on bills: 壹佰贰拾叁; 10 is 壹拾."""
    return _chinese(number, FORMAL_DIGITS, "亿万仟佰拾")


def traditional(number: str) -> str:
    """Formal numerals with the traditional 萬 and 億."""
    return formal(number).replace("万", "萬").replace("亿", "億")


@lru_cache(maxsize=1000)
def _english_group(value: int) -> str:
    """1 <= value <= 999."""
    words = []
    if value >= 100:
        words.append(ENGLISH_SMALL[value // 100] + " hundred")
    value %= 100
    if value >= 20:
        words.append(ENGLISH_TENS[value // 10] + ("-" + ENGLISH_SMALL[value % 10] if value % 10 else ""))
    elif value:
        words.append(ENGLISH_SMALL[value])
    return " ".join(words)


def english(number: str) -> str:
    """one hundred twenty-three; negative five point zero seven."""
    negative, whole, fraction = _parts(number)
    words = []
    for size, scale in ENGLISH_SCALES:
        group, whole = divmod(whole, size)
        if group:
            words.append(_english_group(group) + scale)
    words = words or ["zero"]
    if fraction:
        words += ["point", *(ENGLISH_SMALL[int(digit)] for digit in fraction)]
    return " ".join(["negative", *words] if negative else words)


def half_width(number: str) -> str:
    """-120.05 as it is."""
    return number


def full_width(number: str) -> str:
    """－１２０．０５"""
    return number.translate(FULL_WIDTH)


SCRIPTS: dict[str, Callable[[str], str]] = {
    "half": half_width,
    "full": full_width,
    "chinese": chinese,
    "colloquial": colloquial,
    "formal": formal,
    "traditional": traditional,
    "english": english,
}
"""Name of a script -> function that spells a number in it."""
