"""Where a reply to a published benchmark says its answer: an option's letter, yes or no, a box, a text."""

import re

from reward import Box, answer_of, parse_box

LATEX = re.compile(r"\\[A-Za-z]+|[{}$]")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]{0,99}\}){0,999})\}")
ANSWER_IS = re.compile(
    r"\b(?:answer|(?:correct|right|best|final) (?:option|choice))\b[\s*_]{0,4}(?:is\b|:)[\s:*]{0,8}", re.I
)
# A letter in no word, abbreviation ("e.g.", "C++"), contraction ("I'm") or compound ("A-frame"), and neither
# article nor pronoun: what follows "A" and a space is one of a few words, as in "A is right".
WORD = r"[ \t]{1,9}(?!(?:is|was|and|or|but|because|since|as|for|in|on|which|seems)\b)\w"
LETTER = (
    rf"(?<!\w)(?<!\w['’.+&/-])([B-HJ-Zb-hj-z]|[AaIi](?!{WORD}))(?!\w|[+#]|['’&/-]\w|\.[A-Za-z](?![A-Za-z]))"
)
EITHER = r"[\s)*.]{0,9}(?:,|&|and\b|or\b)[\s(*]{0,9}[A-Z]\b"  # "A or B" leads to nothing
LEADING = re.compile(
    rf"[\s*_\"'`(\[<:]{{0,12}}(?:(?:option|choice|answer)\b[\s:*(]{{0,8}})?{LETTER}(?!{EITHER})", re.I
)


def parts(reply: str) -> list[str]:
    """Where the answer may stand, the surest first: \\boxed{…}, after "answer is", all that is no thought.

    The answer block counts alone (the last of several); a thought that never ended answers nothing.
    """
    text = answer_of(reply)
    if text is None:
        after = reply.rpartition("</think>")[2]
        _, opened, block = after.rpartition("<answer>")
        text = block.partition("</answer>")[0] if opened else "" if "<think>" in after else after
    boxed = BOXED.match(text, max(0, text.rfind("\\boxed{")))
    stated = ANSWER_IS.split(text)[1:]
    out = [boxed[1]] if boxed else []
    return [*out, *(line.partition("\n")[0] for line in stated[-1:]), text]


def choice_of(reply: str, options: dict[str, str]) -> str | None:
    """The chosen letter: leading, alone, or that of the one option whose text occurs, in the surest part."""
    texts = {letter: " ".join(text.lower().split()) for letter, text in options.items()}
    names = "|".join(re.escape(text) for text in sorted(texts.values(), key=len, reverse=True) if text)
    named = re.compile(rf"(?<![\w-])(?<!\d[.,])(?:{names})(?!\w|[.,]\d|-\w)")
    for part in (LATEX.sub(" ", part) for part in parts(reply)):
        leading = {match[1].upper() for match in [LEADING.match(part)] if match}
        alone = {letter.upper() for letter in re.findall(LETTER, part)}
        said = set(named.findall(" ".join(part.lower().split())))
        by_text = {letter for letter, text in texts.items() if text and text in said}
        for letters in (leading & texts.keys(), alone & texts.keys(), by_text):
            if len(letters) == 1:
                return letters.pop()
    return None


def yes_no(reply: str) -> str | None:
    """The first word of the answer, or the only one of "yes" and "no" that is in it."""
    for part in parts(reply):
        words = re.findall(r"\w+", LATEX.sub(" ", part).lower())
        found = {"yes", "no"}.intersection(words[:1]) or {"yes", "no"}.intersection(words)
        if len(found) == 1:
            return found.pop()
    return None


def box_of(reply: str) -> Box | None:
    """The box of the answer block, or the last four numbers in brackets ("bbox_2d": [10, 20, 30, 40])."""
    lists = re.findall(r"\[[^][]{7,99}\]", parts(reply)[-1])[::-1]
    boxes = map(parse_box, [reply, *(f"<answer>{numbers}</answer>" for numbers in lists)])
    return next(filter(None, boxes), None)


def contains(reply: str, answers: tuple[str, ...], category: str) -> bool:
    """OCRBench's rule: an accepted answer occurs in the reply; in formulas case counts and spaces do not."""
    formula = category == "Handwritten Mathematical Expression Recognition"
    forms = [text.strip().replace("\n", " ") for text in (reply, *answers)]
    forms = [text.replace(" ", "") if formula else text.lower() for text in forms]
    return any(form in forms[0] for form in forms[1:])
