"""Replies as models write them, each made for a letter, a word or a box that it means.

Every template is filled for many sets of options, so the meant answer is known. The templates follow what
instruction-tuned and reasoning models write on multiple-choice, yes/no and grounding benchmarks. Templates
that mean None are part of the sets: a reader that always finds an answer must not pass.
"""

import random
from collections.abc import Iterator
from string import ascii_uppercase

OPTION_SETS = [
    ["red", "blue", "green", "white"],
    ["red", "dark red", "light red", "pink"],
    ["2", "3", "4", "12"],
    ["20°C", "25°C", "30°C", "35°C"],
    ["5 cm", "10 cm", "15 cm", "50 cm"],
    ["$1.99", "$2.99", "$12.99", "$3.49"],
    ["15%", "25%", "35%", "50%"],
    ["10:30", "11:30", "12:45", "9:15"],
    ["1998", "2005", "2012", "2021"],
    ["Gate B", "Gate A", "Gate D", "Gate C"],
    ["Vitamin C", "Vitamin A", "Vitamin D", "Vitamin B"],
    ["Terminal A", "Platform B", "Exit C", "Hall D"],
    ["Plan B", "Plan A", "Both plans", "No plan"],
    ["Not visible", "On the left", "On the right", "In the middle"],
    ["No dog is there", "One dog is there", "Two dogs are there", "Three dogs are there"],
    ["None of the above", "A bus", "A bicycle", "A motorcycle"],
    ["a man with a hat", "a woman in a red coat", "a child on a bike", "a dog"],
    ["The left one", "The right one"],
    ["above", "below"],
    ["Yes", "No"],
    ["The truck is behind the red car", "The truck is in front of the red car", "The truck is not there"],
    ["North", "South", "East", "West", "North-East"],
    ["pull-up", "push-up", "sit-up", "T-shirt"],
    ["AB 1234", "BC 4321", "CD 5678", "A1 B2"],
    ["Dr. A. Smith", "Mr. B. Jones", "Ms. C. Lee", "I. Newton"],
    ["C++", "Python", "Java", "C#"],
    ["狗", "猫", "鸟", "马"],
    ["x = 3", "x = -3", "y = 3", "y = -3"],
    ["café", "bakery", "hotel", "pharmacy", "bank"],
    ["The image does not feature the number", "35", "53", "85", "38"],
]

# {L} the meant letter, {T} its text; {W} and {V} other letters, {w} and {v} their texts; {LIST} all options.
CHOICE = [
    # the letter alone, as told
    "{L}", "{L}.", "({L})", "{L})", "[{L}]", "**{L}**", "`{L}`", '"{L}"', "_{L}_", "{l}", "({l})", " {L}\n",
    "$\\mathbf{{{L}}}$", "{L}\n{L}",
    # the letter and its text
    "{L}. {T}", "{L}: {T}", "({L}) {T}", "{L}) {T}", "**{L}. {T}**", "**({L}) {T}**", "{L} - {T}", "{L}-{T}",
    "{L}.{T}", "{L}, {T}", "{T} ({L})", "{L} ({T})", "**{L}**: {T}.",
    # the text alone
    "{T}", "{T}.", "**{T}**", "It is {T}.", "The answer is {T}.", "The correct answer is **{T}**.",
    "Based on the image, the answer is: {T}.", "The picture shows {T}, not {w}.", '"{T}"', "Answer: {T}",
    # the letter with a name
    "Option {L}", "Option {L} fits", "Option {L} is right.", "Option {L}: {T}", "option ({l})", "Choice {L}",
    "The best choice is {L}", "The correct option is {L}.", "The correct option is ({L}) {T}.",
    "The correct choice is {L}, which says {T}.", "Hence, option ({L}) is correct.",
    "The picture shows {T}, which corresponds to option {L}.", "The letter is {L}.",
    # "answer"
    "Answer: {L}", "Answer: {L}. {T}", "**Answer:** {L}", "**Answer: {L}**", "**Answer**: **{L}**",
    "ANSWER: {L}",
    "Answer is {L}", "Answer - {L}", "The answer is {L}.", "The answer is ({L}).", "The answer is {L}. {T}",
    "The answer is {L}: {T}.", "The answer is **{L}. {T}**.", "The answer is \"{L}\".", "My answer is {L}",
    "The correct answer is {L}: {T}.", "The correct answer is **{L}**.", "Correct answer: {L}",
    "Final answer: {L}", "### Final Answer\n\n{L}", "### Final Answer:\n**{L}. {T}**",
    "The answer is option {L}.", "The answer is choice {L}) {T}", "The answer should be {L}.",
    "The answer would be {L}", "The answer must be {L}, as one can see.", "Sure! The answer is {L}.",
    "The best answer is:\n{L}", "Therefore, the correct answer is:\n\n**{L}. {T}**",
    "Looking closely at the sign in the middle, one reads its label. Therefore, the answer is {L}.",
    "The answer is {L} because the other objects are too small.", "So the answer is {L}. I hope this helps!",
    '{{"answer": "{L}"}}', '```json\n{{"answer": "{L}"}}\n```',
    '{{"answer": "{L}", "reason": "one can see it"}}',
    # LaTeX and tags
    "\\boxed{{{L}}}", "\\boxed{{\\text{{{L}}}}}", "\\boxed{{\\text{{{L}. {T}}}}}", "\\boxed{{{T}}}",
    "The answer is $\\boxed{{{L}}}$.", "So we have\n\\[\n\\boxed{{{L}}}\n\\]", "<answer>{L}</answer>",
    "<answer> {L}. {T} </answer>", "<answer>{T}</answer>", "<answer>\nOption {L}\n</answer>",
    "<think>It could be {W} or {V}. Let me look again.</think><answer>{L}</answer>",
    "<think>The answer is {W}? No.</think>\n\n{L}", "<think>Hm.</think>The answer is {L}",
    "<think>I see it.</think>\n<answer>The answer is {L}.</answer>", "<|begin_of_box|>{L}<|end_of_box|>",
    # a decision in words
    "I choose {L}.", "I would choose option {L}.", "I would go with {L}.", "I pick {L}", "I'd say {L}.",
    "I select {L}: {T}", "So {L}.", "Therefore, {L}.", "Thus, {L} is the right answer.", "{L} is correct.",
    "{L} is the correct answer, because the others are hidden.", "It must be {L}.", "I think it is {L}.",
    # what is excluded
    "The answer is {L} not {W}", "The answer is {L}, not {W}.", "The answer is {L}, {W} is wrong",
    "The answer is {L} rather than {W}.", "I prefer {L} over {W}.", "Not {W}, but {L}.",
    "The answer is not {W}; it is {L}.", "The answer isn't {W}, it is {L}.", "It's not {W}. It's {L}.",
    "{W} is wrong, so {L}.", "{W} and {V} are wrong, so {L}.", "It can't be {W}, so it must be {L}.",
    "Option {W} is wrong. Option {L} fits.", "Neither {W} nor {V}, so {L}.", "{L} instead of {W}",
    "The right answer is {L}: {T}, not {W}: {w}.", "Option {L}, not option {W}", "{L}, not {W}",
    "{W} is incorrect: it is too small.\n{V} is incorrect: it is too dark.\nThe correct answer is {L}.",
    "{L}\n\nExplanation: the picture shows {T}, not {w}.", "{L}. The others ({W}, {V}) do not match.",
    "The answer is {L}.\nThe other options ({W}, {V}) do not match.", "Between {W} and {L}, I choose {L}.",
    "At first I thought of {W}, but the answer is {L}.", "I considered {W}. The correct answer is {L}.",
    "I think the answer is {L}, although {W} is close.",
    # lists of options
    "{LIST}\nSo {L}.", "{LIST}\n\nAnswer: {L}", "{SLASHED} / So {L}.", "{LIST}\n\nI choose {L}.",
    "Let's look at the options:\n{LIST}\n\nThe picture shows {T}, so the correct answer is {L}.",
    "The options are {COMMAS}. The picture matches option {L}.", "{LIST}\n\nThe correct one is {L}. {T}",
    "1. Look at the picture.\n2. Compare.\n\nAnswer: {L}",
    # Chinese and full-width letters
    "选{L}", "答案是{L}", "答案:{L}", "答案：{L}", "答案为{L}。", "正确答案是：{L}", "选项{L}",
    "应该选{L}。", "{F}",
    "答案：{F}", "（{F}）", "{F}。{T}", "因此，正确答案是{L}。", "选择{L}，而不是{W}",
]  # fmt: skip
NO_CHOICE = [
    "", "Neither {W} nor {V}", "Neither A nor C", "{W} or {V}", "It could be {W} or {V}.", "I cannot tell.",
    "Not {W}.", "<think>The answer is {W}", "<think>{W}</think>", "Both {W} and {V} are possible.",
    "{LIST}", "{W} and {V} are wrong", "Sorry, the picture is too dark.", "A large object stands here.",
]  # fmt: skip
YES_NO = {
    "yes": [
        "Yes", "yes", "YES", "Yes.", "**Yes**", "_Yes_", "Yes!", '"Yes"',
        "Yes, there is a {n} in the picture.",
        "Yes, there is no doubt.", "yes, there is no doubt", "No doubt, yes.", "There is no doubt: yes.",
        "The answer is yes.", "Answer: Yes", "**Answer:** Yes", "I would say yes.", "\\boxed{{yes}}",
        "\\boxed{{\\text{{Yes}}}}", "<answer>Yes</answer>",
        "<think>No {n}? I see it now.</think><answer>Yes</answer>",
        "<think>no</think>Yes", "Yes, the {n} is on the left, no other object is near.",
        "Without question, yes.",
        "Yes - the {n} is there.", "The correct answer is: **Yes**", "It is there, so yes.",
        "Yes\n\nThe {n} is red.",
        "The answer is yes, not no.", "ＹＥＳ", '{{"answer": "yes"}}', "Yes, no question about it.",
    ],
    "no": [
        "No", "no", "NO", "No.", "**No**", "_No_", "No!", "'No'", "No, there is no {n} in the picture.",
        "There is no {n}.", "No {n} is visible.", "I see no {n} here.", "The answer is no.", "Answer: No",
        "No, yes would be wrong.", "\\boxed{{no}}", "<answer>No</answer>", "<think>Yes?</think>\n\nNo",
        "<think>A {n}? yes or no</think><answer>No.</answer>", "I would say no.",
        "The picture is dark, so no.",
        "No, the {n} is not there.", "No - it is a chair.", "The correct answer is: **No**", "no, not at all",
        "No\n\nThe picture shows a chair.", "The answer is no, not yes.", "No, there isn't a {n}.",
        '{{"answer": "No"}}', "No. There is no {n} and no table.",
    ],
    None: [
        "", "Yes/No", "yes/no", "Yes. No.", "It may be yes or no", "I cannot tell.", "The {n} is there.",
        "No/Yes",
        "<think>yes", "Either yes or no.",
    ],
}  # fmt: skip
NOUNS = ["dog", "cat", "bottle", "dining table", "person", "red car", "traffic light", "umbrella"]
BOXES = [
    "[{b}]", "<answer>[{b}]</answer>", "<think>left</think><answer>[{b}]</answer>", "({b})", "{b}", "{s}",
    "<answer>({b})</answer>", "<answer>{b}</answer>", "{p}", "({x1},{y1}),({x2},{y2})",
    "({x1}, {y1}) to ({x2}, {y2})",
    "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>", "<ref>cup</ref><box>({x1},{y1}),({x2},{y2})</box>",
    "<box>{s}</box>", "[{s}]", "[[{b}]]", "[{b}].", "The box is [{b}].",
    "The cup is at [{b}] in the picture.",
    '```json\n[{{"bbox_2d": [{b}], "label": "cup"}}]\n```', '[{{"bbox_2d": [{b}]}}]', '{{"bbox_2d": [{b}]}}',
    '```json\n[\n\t{{"bbox_2d": [{b}], "label": "cup"}},\n\t{{"bbox_2d": [{c}], "label": "dog"}}\n]\n```',
    '[{{"bbox_2d": [{b}]}}, {{"bbox_2d": [{c}]}}]', "[[{b}], [{c}]]",
    '{{"bbox_2d": [{b}], "label": "cup 2"}}',
    '<answer>[{{"bbox_2d": [{b}], "label": "cup"}}]</answer>', '{{"bounding_box": [{b}]}}',
    '<think>[{c}]</think><answer>```json\n{{"bbox_2d": [{b}], "label": "cup"}}\n```</answer>',
    "At first [{c}], but rather [{b}]", "[{c}] no, [{b}]", "The dog is at [{c}]. The cup is at [{b}].",
    "top-left ({x1}, {y1}), bottom-right ({x2}, {y2})", "x1={x1}, y1={y1}, x2={x2}, y2={y2}",
    '{{"x1": {x1}, "y1": {y1}, "x2": {x2}, "y2": {y2}}}', "\\boxed{{[{b}]}}", "**[{b}]**", "Answer: [{b}]",
    "The answer is ({b}).", "The coordinates are {b}.", "[{x1}.0, {y1}.5, {x2}.0, {y2}.25]",
    "x1: {x1}, y1: {y1}, x2: {x2}, y2: {y2}",
    "[({x1}, {y1}), ({x2}, {y2})]", "[[{x1}, {y1}], [{x2}, {y2}]]",
]  # fmt: skip
NO_BOX = [
    "",
    "nowhere",
    "[{x1}, {y1}, {x2}]",
    "[{x2}, {y2}, {x1}, {y1}]",
    "<think>[{b}]",
    "I see {x1} cups.",
    "[{b}, 7]",
]


def choice_replies(seed: int = 0) -> Iterator[tuple[str, dict[str, str], str | None, str]]:
    """(reply, options, meant letter or None, template): every template for every set of options."""
    rng = random.Random(seed)
    for texts in OPTION_SETS:
        texts = rng.sample(texts, len(texts))
        options = dict(zip(ascii_uppercase, texts))
        for template in (*CHOICE, *NO_CHOICE):
            if "{V}" in template and len(texts) < 3:
                continue
            if template == "Neither A nor C" and len(texts) < 3:
                continue
            meant, other, *third = rng.sample(list(options), min(3, len(texts)))
            third = third[0] if third else other
            pairs = [f"{letter}. {text}" for letter, text in options.items()]
            fields = {"L": meant, "l": meant.lower(), "F": chr(ord(meant) + 0xFEE0), "T": options[meant]}
            fields |= {"W": other, "w": options[other], "V": third, "v": options[third]}
            fields |= {"LIST": "\n".join(pairs), "SLASHED": " / ".join(pairs), "COMMAS": ", ".join(pairs)}
            yield template.format(**fields), options, meant if template in CHOICE else None, template


def yes_no_replies() -> Iterator[tuple[str, str | None, str]]:
    """(reply, meant word or None, template)."""
    for meant, templates in YES_NO.items():
        for template in templates:
            for noun in NOUNS:
                yield template.format(n=noun), meant, template


def box_replies(seed: int = 0) -> Iterator[tuple[str, tuple | None, str]]:
    """(reply, meant box or None, template)."""
    rng = random.Random(seed)
    for template in (*BOXES, *NO_BOX):
        for _ in range(12):
            x1, y1, c1, c2 = (rng.randint(0, 499) for _ in range(4))
            x2, y2 = x1 + rng.randint(5, 500), y1 + rng.randint(5, 500)
            fields = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "b": f"{x1}, {y1}, {x2}, {y2}"}
            fields |= {
                "s": f"{x1} {y1} {x2} {y2}",
                "p": f"({x1},{y1}),({x2},{y2})",
                "c": f"{c1}, {c2}, {c1 + 9}, {c2 + 9}",
            }
            decimals = (0, 0.5, 0, 0.25) if ".25" in template else (0, 0, 0, 0)
            box = tuple(float(value + part) for value, part in zip((x1, y1, x2, y2), decimals, strict=True))
            yield template.format(**fields), box if template in BOXES else None, template
