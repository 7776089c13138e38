"""Plots with roles, and the stories that are told from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm.corpus import Dice, Page, pick, pick_some
from minillm.world.lexicon import (
    ANIMALS,
    COLORS,
    FAMILIES,
    HOLDERS,
    ITEMS,
    NAMES,
    NUMBERS,
    PLACES,
    article,
    count_phrase,
)

GIVING_PLOTS = """
gift: a b x=toy c
{a} had {one_cx}. / One morning, {a} found {one_cx}. || {a}有一{zcx}。 / 一天早上，{a}找到了一{zcx}。
It was the birthday of {b}. / {b} was sad that day. || 那天是{b}的生日。 / 那天{b}很难过。
"This {x} is for you," said {a}. / {a} gave the {x} to {b}. || {a}说：“这{zx}送给你。” / {a}把这{zx}送给了{b}。
{b} took it and smiled. / {b} danced for joy. || {b}笑着收下了。 / {b}高兴得跳了起来。
? It is good to give. || 给予让人快乐。
Q Who has the {x} now? = {b} || {x}现在在谁手里？ = {b}
Q Who gave the {x} away? = {a} || 谁把{x}送给了别人？ = {a}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

lost: a b x=toy c p q
{a} went to {p} with {one_cx}. / One day, {a} took {one_cx} to {p}. || {a}带着一{zcx}去了{p}。 / 有一天，{a}拿着一{zcx}来到{p}。
On the way home, {a} lost the {x}. || 回家的路上，{a}弄丢了{x}。
{b} found the {x} in {q}. / Later, {b} saw the {x} in {q}. || {b}在{q}里找到了{x}。 / 后来，{b}在{q}里看见了{x}。
"Is this {x} yours?" asked {b}. || {b}问：“这{zx}是你的吗？”
{a} thanked {b} and took the {x} home. || {a}谢过{b}，把{x}带回了家。
? A good friend gives back what was lost. || 好朋友会把捡到的东西还给别人。
Q Who has the {x} now? = {a} || {x}现在在谁手里？ = {a}
Q Who found the {x}? = {b} || 谁找到了{x}？ = {b}
Q Where was the {x} found? = {q} || {x}是在哪里找到的？ = {q}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

trade: a b x=toy y=toy
{a} had {one_x} and {b} had {one_y}. || {a}有一{zx}，{b}有一{zy}。
"I like your {y}," said {a}. || {a}说：“我喜欢你的{y}。”
"And I like your {x}," said {b}. || {b}说：“我也喜欢你的{x}。”
So they traded. / So they changed the {x} for the {y}. || 于是他们交换了。 / 于是他们用{x}换了{y}。
? Both of them were happy. || 两个人都很高兴。
Q Who has the {x} now? = {b} || {x}现在在谁手里？ = {b}
Q Who has the {y} now? = {a} || {y}现在在谁手里？ = {a}
Q Who had the {x} at first? = {a} || {x}一开始在谁手里？ = {a}

borrow: a b d x=toy c
{a} lent {one_cx} to {b}. || {a}把一{zcx}借给了{b}。
{b} lent the {x} to {d}. || {b}又把{x}借给了{d}。
"Where is my {x}?" asked {a}. || {a}问：“我的{x}在哪里？”
"{d} has it now," said {b}. || {b}说：“现在在{d}那里。”
? Ask before you lend what is not yours. || 别人的东西不能随便借出去。
Q Who has the {x} now? = {d} || {x}现在在谁手里？ = {d}
Q Whose {x} is it? = {a} || {x}是谁的？ = {a}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}
"""

COUNTING_PLOTS = """
share: a b x=food n=m+k
{a} had {nx}. / One day, {a} came home with {nx}. || {a}有{nx}。 / 有一天，{a}带回家{nx}。
{b} was hungry and had none. / {b} had no {xs}. || {b}饿了，可是什么吃的也没有。 / {b}没有{x}。
{a} gave {b} {mx}. / "Take {mx}," said {a} to {b}. || {a}给了{b}{mx}。 / {a}对{b}说：“给你{mx}。”
? Now {a} had {kx} left. || 现在{a}还剩{kx}。
They sat down and ate together. || 他们坐下来一起吃。
? Food tastes better when it is shared. || 好东西要一起分享。
Q How many {xs} did {a} have at first? = {n} || {a}一开始有几{zx}？ = {nz}
Q How many {xs} did {b} get? = {m} || {b}得到了几{zx}？ = {mz}
Q How many {xs} does {a} have left? = {k} || {a}还剩几{zx}？ = {kz}

gather: a b x=stock n+m=k p h
{a} and {b} went to {p} to look for {xs}. || {a}和{b}去{p}找{x}。
{a} found {nx} and {b} found {mx}. || {a}找到了{nx}，{b}找到了{mx}。
? "Now we have {kx}!" said {a}. || {a}说：“现在我们有{kx}了！”
They put all the {xs} into {h}. || 他们把{x}都放进了{h}里。
? Many hands make light work. || 人多力量大。
Q How many {xs} did {a} find? = {n} || {a}找到了几{zx}？ = {nz}
Q How many {xs} did {b} find? = {m} || {b}找到了几{zx}？ = {mz}
Q How many {xs} do they have? = {k} || 他们一共有几{zx}？ = {kz}
Q Where are the {xs}? = {h} || {x}在哪里？ = {h}

market: a b x=toy y=coin n=m+k
{a} went to the market with {ny}. || {a}带着{ny}去了市场。
{a} bought {one_x} from {b} for {my}. || {a}花{my}向{b}买了一{zx}。
? {a} put {ky} back into the bag. || {a}把{ky}放回了袋子里。
"Thank you," said {b}. "Come again!" || {b}说：“谢谢，下次再来！”
Q How many coins does {a} have left? = {k} || {a}还剩几枚硬币？ = {kz}
Q How many coins did the {x} cost? = {m} || {x}花了几枚硬币？ = {mz}
Q Who sold the {x}? = {b} || 谁卖了{x}？ = {b}
Q What did {a} buy? = the {x} || {a}买了什么？ = {x}

plant: a b x=plant n+m=k p
In spring, {a} planted {nx} in {p}. || 春天，{a}在{p}里种了{nx}。
{b} came and planted {mx} more. || {b}也来种了{mx}。
? Soon {kx} stood in the sun. || 不久，{kx}在阳光下长大了。
"How pretty!" said {b}. || {b}说：“真好看！”
? Good things take time. || 好事需要耐心。
Q How many {xs} did {a} plant? = {n} || {a}种了几{zx}？ = {nz}
Q How many {xs} did {b} plant? = {m} || {b}种了几{zx}？ = {mz}
Q How many {xs} are there? = {k} || 一共有几{zx}？ = {kz}
Q Where are the {xs}? = {p} || {x}种在哪里？ = {p}
"""

FINDING_PLOTS = """
treasure: a b x=map y=coin p q n=k+k
{a} found {one_x} in {p}. || {a}在{p}里找到了一{zx}。
The {x} led {a} and {b} to {q}. || {x}把{a}和{b}带到了{q}。
There they dug up {ny}. || 他们在那里挖出了{ny}。
? Each of them got {ky}. || 他们每人分到{ky}。
Q Where was the {x}? = {p} || {x}是在哪里找到的？ = {p}
Q Where were the coins? = {q} || 硬币是在哪里挖出来的？ = {q}
Q How many coins did they find? = {n} || 他们挖出了几枚硬币？ = {nz}
Q How many coins did each of them get? = {k} || 他们每人分到几枚硬币？ = {kz}

hide: a b x=toy h g
{a} hid {one_x} in {h}. || {a}把一{zx}藏进了{h}里。
"Find it if you can!" said {a}. || {a}说：“看你能不能找到！”
{b} looked in {g}, but it was empty. || {b}先看了看{g}，里面是空的。
Then {b} opened {h} and laughed. || 然后{b}打开{h}，笑了起来。
? It was a good game. || 这个游戏真好玩。
Q Where did {a} hide the {x}? = {h} || {a}把{x}藏在哪里？ = {h}
Q Who hid the {x}? = {a} || 谁把{x}藏了起来？ = {a}
Q Who found the {x}? = {b} || 谁找到了{x}？ = {b}
Q What was empty? = {g} || 什么是空的？ = {g}

moved: a b x=toy h g
{a} put {one_x} into {h} and went out. || {a}把一{zx}放进{h}里，就出去了。
Then {b} moved the {x} to {g}. || 后来，{b}把{x}移到了{g}里。
{a} came back and looked in {h}. || {a}回来后，先去{h}里找。
? "I moved it," said {b}. "I am sorry." || {b}说：“是我移动了它，对不起。”
Q Where is the {x} now? = {g} || {x}现在在哪里？ = {g}
Q Where did {a} look? = {h} || {a}先去哪里找？ = {h}
Q Who moved the {x}? = {b} || 谁移动了{x}？ = {b}

animal: a s p q x=food n
In {p}, {a} met a hungry {s}. || {a}在{p}里遇到了一{zs}，它很饿。
{a} gave it {nx}. || {a}给了它{nx}。
The {s} ate and followed {a} to {q}. || {s}吃完后，跟着{a}去了{q}。
? "Stay with me," said {a}. || {a}说：“留在我身边吧。”
? Be kind and you will find friends. || 善良的人会有朋友。
Q What animal did {a} meet? = the {s} || {a}遇到了什么动物？ = {s}
Q Where did {a} meet the {s}? = {p} || {a}是在哪里遇到{s}的？ = {p}
Q Where is the {s} now? = {q} || {s}现在在哪里？ = {q}
Q How many {xs} did the {s} get? = {n} || {s}得到了几{zx}？ = {nz}
"""

HELPING_PLOTS = """
broken: a b x=toy c p
{b} had {one_cx}. || {b}有一{zcx}。
One day, {a} dropped the {x} in {p} and it broke. || 有一天，{a}在{p}里把{x}摔坏了。
"I am sorry," said {a}. "I broke your {x}." || {a}说：“对不起，我弄坏了你的{x}。”
"Thank you for telling me," said {b}. || {b}说：“谢谢你告诉我。”
? They mended it together. || 他们一起把它修好了。
? It is best to tell the truth. || 做人要诚实。
Q Who broke the {x}? = {a} || 谁弄坏了{x}？ = {a}
Q Whose {x} was it? = {b} || {x}是谁的？ = {b}
Q Where did the {x} break? = {p} || {x}是在哪里摔坏的？ = {p}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

rain: a b x=umbrella c p
It rained hard all day. || 雨下了一整天。
{a} had {one_cx}, but {b} had none. || {a}有一{zcx}，可是{b}没有。
"Come under my {x}," said {a}. || {a}说：“到我的{x}下面来吧。”
They walked to {p} and stayed dry. || 他们一起走到{p}，谁也没有淋湿。
Q Who had the {x}? = {a} || 谁有{x}？ = {a}
Q Where did they walk? = {p} || 他们走到了哪里？ = {p}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

dark: a b x=lamp c p
{a} was afraid of the dark in {p}. || {a}怕{p}里的黑暗。
{b} brought {one_cx}. || {b}拿来了一{zcx}。
"Keep it beside you," said {b}. || {b}说：“把它放在身边吧。”
{a} was not afraid any more. || {a}再也不害怕了。
Q Who was afraid? = {a} || 谁怕黑？ = {a}
Q Who brought the {x}? = {b} || {x}是谁拿来的？ = {b}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}
Q Where was it dark? = {p} || 哪里很黑？ = {p}

bake: a b x=food n=m+k p
{a} was cooking and needed {nx}. || {a}要做饭，需要{nx}。
But {a} had only {mx}. || 可是{a}只有{mx}。
So {b} ran to {p} and brought {kx}. || 于是{b}跑到{p}，拿来了{kx}。
"Now we can cook," said {a}. || {a}说：“现在可以做饭了。”
Q How many {xs} did {a} need? = {n} || {a}需要几{zx}？ = {nz}
Q How many {xs} did {b} bring? = {k} || {b}拿来了几{zx}？ = {kz}
Q Where did {b} go? = {p} || {b}跑到了哪里？ = {p}
"""

FABLES = """
race: a b d p
{a}, {b} and {d} ran a race in {p}. || {a}、{b}和{d}在{p}里赛跑。
{a} was fast, but stopped to sleep. || {a}跑得很快，可是停下来睡着了。
{b} ran on and won. || {b}一直跑，得了第一。
{d} came second and {a} was last. || {d}得了第二，{a}是最后一名。
? Slow and steady wins the race. || 坚持就是胜利。
Q Who won the race? = {b} || 谁得了第一？ = {b}
Q Who came second? = {d} || 谁得了第二？ = {d}
Q Who was last? = {a} || 谁是最后一名？ = {a}
Q Where was the race? = {p} || 他们在哪里赛跑？ = {p}

alarm: a b s p n
{a} watched the goats near {p}. || {a}在{p}旁边放羊。
{a} shouted "Help!" {n} times, but nothing was wrong. || {a}喊了{n}次“救命”，可是什么事也没有。
{b} came running each time and was angry. || {b}每次都跑过来，很生气。
Then a {s} really came, and nobody helped. || 后来真的来了一{zs}，却没有人来帮忙。
? Nobody believes a liar. || 说谎的人没有人相信。
Q Who shouted? = {a} || 谁在喊救命？ = {a}
Q Who came running? = {b} || 谁跑过来了？ = {b}
Q How many times did {a} shout? = {n} || {a}喊了几次？ = {n}次
Q What animal came? = the {s} || 来了什么动物？ = {s}

wish: a s d c p x=toy
{a} saved {one_s} in {p}. || {a}在{p}里救了一{zs}。
"You may have a wish," said the {s}. || {s}说：“你可以许一个愿望。”
{a} wished for {one_cx} for {d}. || {a}替{d}许愿，要一{zcx}。
The next day, {d} found the {x} at the door. || 第二天，{d}在门口看到了这{zx}。
? The best wish is for someone else. || 最好的愿望是为别人许的。
Q Who has the {x} now? = {d} || {x}现在在谁手里？ = {d}
Q Who saved the {s}? = {a} || 谁救了{s}？ = {a}
Q Where was the {s}? = {p} || {s}是在哪里得救的？ = {p}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

count: a b x=stock h n=m+k
{a} kept {nx} in {h}. || {a}在{h}里放了{nx}。
At night, {mx} fell through a hole. || 夜里，{mx}从破洞里掉了出去。
? In the morning, {a} counted only {kx}. || 早上，{a}只数到了{kx}。
{b} mended the hole. || {b}补好了破洞。
? A small hole can sink a great ship. || 小洞不补，大洞吃苦。
Q How many {xs} did {a} keep at first? = {n} || {a}一开始放了几{zx}？ = {nz}
Q How many {xs} are left? = {k} || 还剩几{zx}？ = {kz}
Q Who mended the hole? = {b} || 破洞是谁补好的？ = {b}
Q Where were the {xs}? = {h} || {x}放在哪里？ = {h}
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step of a plot: its wordings in each language, and whether a story may leave it out."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    optional: bool

    def wordings(self, lang: str) -> tuple[str, ...]:
        """The templates in one language."""
        return self.en if lang == "en" else self.zh


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Roles, steps, and questions as (question, answer) templates in each language."""

    name: str
    roles: tuple[str, ...]
    lines: tuple[Line, ...]
    questions: tuple[dict[str, tuple[str, str]], ...]


def parse_plot(block: str) -> Plot:
    """Read a plot from its table.

    The head is "name: roles". Then a line for each step, "English || 中文", wordings apart by " / ", "?" before what may be
    left out, and "Q question = answer || 问题 = 答案".
    """
    head, *rows = block.strip().split("\n")
    name, _, roles = head.partition(": ")
    lines, asked = [], []
    for row in rows:
        mark, text = (row[0], row[2:]) if row[:2] in ("? ", "Q ") else ("", row)
        en, zh = (side.strip() for side in text.split("||"))
        if mark == "Q":
            (ask_en, _, answer_en), (ask_zh, _, answer_zh) = en.partition(" = "), zh.partition(" = ")
            asked.append({"en": (ask_en, answer_en), "zh": (ask_zh, answer_zh)})
        else:
            lines.append(Line(en=tuple(en.split(" / ")), zh=tuple(zh.split(" / ")), optional=mark == "?"))
    return Plot(name=name, roles=tuple(roles.split()), lines=tuple(lines), questions=tuple(asked))


PLOTS = {
    plot.name: plot
    for table in (GIVING_PLOTS, COUNTING_PLOTS, FINDING_PLOTS, HELPING_PLOTS, FABLES)
    for plot in map(parse_plot, table.strip().split("\n\n"))
}

PLOT_LIST = tuple(PLOTS.values())

# What a letter stands for in a plot: people, places, containers, a colour, an animal. x and y are things, n, m and k counts.
CASTS = {
    "a": NAMES,
    "b": NAMES,
    "d": NAMES,
    "p": PLACES,
    "q": PLACES,
    "h": HOLDERS,
    "g": HOLDERS,
    "c": COLORS,
    "s": ANIMALS,
}

CAST_POOLS = {letter: tuple(table) for letter, table in CASTS.items()}

COUNT_RULES = {
    "n=m+k": ("n", "m", "k"),
    "n+m=k": ("k", "n", "m"),
    "n=k+k": ("n", "k", "k"),
}  # whole, part, rest


def draw_counts(r: Dice, rule: str) -> dict[str, int]:
    """Counts up to ten that obey a plot's rule: "n" alone, or one of `COUNT_RULES`."""
    if rule == "n":
        return {"n": 2 + int(r() * 7)}
    whole, part, rest = COUNT_RULES[rule]
    if part == rest:
        half = 1 + int(r() * 5)
        return {whole: 2 * half, part: half}
    total = 3 + int(r() * 8)
    some = 1 + int(r() * (total - 1))
    return {whole: total, part: some, rest: total - some}


def fill_roles(plot: Plot, r: Dice) -> dict[str, Any]:
    """Draw who and what a plot is about. Names are keys of the tables, in no language."""
    plan: dict[str, Any] = {"plot": plot.name}
    for role in plot.roles:
        letter, _, family = role.partition("=")
        if letter in CASTS or letter in "xy":
            pool = CAST_POOLS[letter] if letter in CASTS else FAMILIES[family]
            value = pick(r, pool)
            while value in plan.values():  # no two roles are one and the same
                value = pick(r, pool)
            plan[letter] = value
        else:
            plan.update(draw_counts(r, role))
    return plan


def plan_story(r: Dice) -> dict[str, Any]:
    """A plot with its roles filled: the world that a story tells of."""
    return fill_roles(pick(r, PLOT_LIST), r)


def item_forms(role: str, plan: Mapping[str, Any], lang: str) -> dict[str, str]:
    """What templates may ask about a thing: {x}, {xs}, {one_x}, {one_cx}, {zx}, {zcx}, {nx}, {nz}."""
    noun = ITEMS[plan[role]]
    colour = plan.get("c") if role == "x" else None
    counts = [letter for letter in "nmk" if letter in plan]
    forms = {letter + role: count_phrase(plan[letter], noun.one, lang) for letter in counts}
    if lang == "en":
        forms |= {role: noun.one, role + "s": noun.many, "one_" + role: article(noun.one)}
        if colour:
            forms["one_c" + role] = article(f"{colour} {noun.one}")
        return forms
    forms |= {role: noun.zh, "z" + role: noun.measure + noun.zh}
    if role == "y" or "y" not in plan:  # a bare count, 三个, takes the measure word of what is counted
        forms |= {letter + "z": NUMBERS["zh"][plan[letter]] + noun.measure for letter in counts}
    if colour:
        forms["zc" + role] = f"{noun.measure}{COLORS[colour]}的{noun.zh}"
    return forms


def word_forms(plan: Mapping[str, Any], lang: str) -> dict[str, str]:
    """Every form of a plan's roles that a template of `lang` may ask for."""
    forms: dict[str, str] = {}
    for role, value in plan.items():
        if role in CASTS:
            forms[role] = value if lang == "en" else CASTS[role][value]
            if role == "s":
                forms |= {"one_s": article(value)} if lang == "en" else {"zs": "只" + forms["s"]}
        elif role in ("n", "m", "k"):
            forms[role] = NUMBERS[lang][value]
        elif role in ("x", "y"):
            forms |= item_forms(role, plan, lang)
    return forms


def tell(plan: Mapping[str, Any], lang: str, r: Dice, page: Page, n_questions: int = 0) -> None:
    """Write a plan as a story in one language, then questions about its world, without repeating one."""
    plot, forms = PLOTS[plan["plot"]], word_forms(plan, lang)
    steps = [pick(r, line.wordings(lang)) for line in plot.lines if not line.optional or r() < 0.6]
    page.write((" " if lang == "en" else "").join(step.format_map(forms) for step in steps))
    for index in pick_some(r, range(len(plot.questions)), min(n_questions, len(plot.questions))):
        question, answer = plot.questions[index][lang]
        page.ask(lang, question.format_map(forms), answer.format_map(forms), f"{plot.name}.{index}")
