"""What belongs to a person or opens a door, and must not be learned: e-mail addresses, telephone and card numbers,
keys and tokens. Precision goes before recall: years, ISBNs, prices and plain long numbers are none of these."""

from __future__ import annotations

import re
from collections.abc import Iterator

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}+@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,18}\b", re.IGNORECASE)
LOCAL, LONGEST_LOCAL = re.compile(r"[\w.+-]+"), 64  # what stands before the @
# Domains that are kept free for examples (RFC 2606), so that nobody has an address there.
NOBODY = re.compile(r"@(?:.*\.)?(?:example\.(?:com|org|net|edu)|(?:example|test|invalid|localhost))$", re.IGNORECASE)
PHONE = re.compile(
    r"(?<![\w+.,/=^*-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +49 30 1234567
    r"|(?:1[-. ])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-.])[2-9]\d{2}[-.]\d{4})(?![\w/=^*]|[-.,]\d)"  # (212) 736-5000
)
CARD = re.compile(
    r"(?<![\w.,+-])(?:\d{4}(?:[ -]?\d{4}){2,3}(?:[ -]?\d{1,3})?|3\d{3}[ -]?\d{6}[ -]?\d{4,5})(?![\w-]|[.,]\d)"
)
# First digits and lengths of the issuers' numbers.
ISSUERS = re.compile(
    r"4\d{12}(?:\d{3})?(?:\d{3})?|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
SECRETS = {
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b(?<!EXAMPLE)",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\bsk-(?=[\w-]{0,100}\d)[\w-]{0,80}[A-Za-z0-9]{20,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a Stripe key": r"\b[rs]k_live_[0-9a-zA-Z]{20,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----",
}
SECRET = re.compile("|".join(f"({pattern})" for pattern in SECRETS.values()))
STEMS = (  # to look for what one of them needs is quick
    "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-", "hf_", "AIza", "xox",
    "k_live_", "npm_", "eyJ", "PRIVATE KEY",
)  # fmt: skip
# What each card number has, and each telephone number: to look for these takes a fraction of the time, most of all as
# each begins with one sign, which the engine finds quickly.
HINTS = (r"\d\d{3}", r"\d\d{3}[ -]?\d{4}", r"\d[-.]\d{4}", r"\+\d")
DIGITS, GROUPS, GROUP, PLUS = map(re.compile, HINTS)


def is_card(number: str) -> bool:
    """Whether digits, with blanks or dashes between them, are a payment card's: by issuer, length and checksum."""
    digits = re.sub(r"\D", "", number)
    return ISSUERS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812): every second digit from the right is doubled."""
    doubled = (int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits)))
    return sum(number // 10 + number % 10 for number in doubled) % 10 == 0


def personal(text: str) -> list[str]:
    """Each address and number of a person, in words that do not repeat it."""
    found = [f"an e-mail address, {masked(address)}" for address in _addresses(text) if not NOBODY.search(address)]
    cards, phones, digits = [], [], DIGITS.search(text)
    if digits and GROUPS.search(text):
        cards = [m[0] for m in CARD.finditer(text) if is_card(m[0])]
    if (digits and GROUP.search(text)) or ("+" in text and PLUS.search(text)):
        phones = [m[0] for m in PHONE.finditer(text) if _is_phone(m[0], cards)]
    found += [f"a card number, {masked(number)}" for number in cards]
    found += [f"a telephone number, {masked(number)}" for number in phones]
    return found


def _addresses(text: str) -> Iterator[str]:
    """The e-mail addresses in a text, looked for where an @ is."""
    at, end = text.find("@"), 0  # end: of the last address
    while at >= 0:
        before = LOCAL.match(text[max(end, at - LONGEST_LOCAL - 1) : at][::-1])
        if before and (match := EMAIL.match(text, at - before.end())):
            yield match[0]
            end = match.end()
        at = text.find("@", max(end, at + 1))


def _is_phone(number: str, cards: list[str]) -> bool:
    return 9 <= sum(map(str.isdigit, number)) <= 15 and not any(number in card for card in cards)


def secrets(text: str) -> list[str]:
    """Each key and token, in words that do not repeat it."""
    if not any(stem in text for stem in STEMS):
        return []
    kinds = list(SECRETS)
    return [f"{kinds[m.lastindex - 1]}, {masked(m[0])}" for m in SECRET.finditer(text)]


def masked(text: str) -> str:
    """The first characters of what must not be repeated in a report."""
    return f"{text[:4]}..."
