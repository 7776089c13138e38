"""The bilingual corpus whose truth is known, and readers for real text. (A hand-placed draft of chapter 01's export.)"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, TypeVar

from minillm.checkpoint import MiniLLMError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """One document and what is known about it."""

    text: str
    lang: str = "und"
    kind: str = "text"
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt in the form of the training documents, and the answer that they would continue it with."""

    prompt: str
    answer: str
    kind: str
    lang: str
    meta: dict[str, Any] = field(default_factory=dict)

    def grade(self, continuation: str) -> bool:
        """Is the first line of a model's continuation, after any scratchpad, exactly the answer?"""
        return extract_answer(continuation) == self.answer


def extract_answer(continuation: str) -> str:
    """The answer in a continuation: its first line, behind the last scratchpad bracket or equals sign, without a full stop."""
    line = continuation.lstrip(" ").partition("\n")[0]
    return re.split(r"[\]=]", line)[-1].strip().rstrip(".。")


Dice = Callable[[], float]


def dice(*key: object) -> Dice:
    """A stream of uniform numbers in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    # Of the whole module `random`, only random() is promised to be the same on every Python.
    return random.Random(int.from_bytes(digest, "big")).random


def pick(r: Dice, items: Sequence[T]) -> T:
    return items[int(r() * len(items))]


def pick_some(r: Dice, items: Sequence[T], n: int) -> list[T]:
    """`n` different items, in random order."""
    if n > len(items):
        raise ValueError(f"n={n} different items asked of {len(items)}")
    pool = list(items)
    for i in range(n):
        j = i + int(r() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


HELDOUT_SHARE = 1 / 8


def split_of(*meaning: object) -> str:
    """"heldout" for one meaning in eight, "train" for the others, whatever the words, the language and the seed."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**32 else "train"


class Page:
    """A text under construction that remembers where its answers are."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0
        self.answers: list[list[Any]] = []

    def write(self, text: str) -> None:
        self.parts.append(text)
        self.size += len(text)

    def answer(self, text: str, label: str) -> None:
        """Write what a model must say; `label` says which question it answers."""
        self.answers.append([self.size, self.size + len(text), label])
        self.write(text)

    def ask(self, lang: str, question: str, answer: str, label: str) -> None:
        self.write(("\n" if self.size else "") + ("Q: " if lang == "en" else "问：") + question + "\n")
        self.write("A:" if lang == "en" else "答：")
        self.answer((" " if lang == "en" else "") + answer, label)

    @property
    def text(self) -> str:
        return "".join(self.parts)


# ---------------------------------------------------------------- lexicon

NAMES = dict(
    pair.split("=")
    for pair in """Tom=汤姆 Anna=安娜 Ben=本杰 Lily=莉莉 Sam=山姆 Mia=米娅 Jack=杰克 Lucy=露西 Max=马克 Amy=艾米 Leo=里奥 Ella=埃拉
Tim=蒂姆 Rose=罗丝 Bob=鲍勃 Sara=萨拉 Dan=丹尼 Kate=凯特 Peter=彼得 Nora=诺拉 Eric=埃里克 Emma=爱玛 Mike=迈克 Ruby=露比
Paul=保罗 Alice=爱丽丝 Ming=小明 Hong=小红 Mei=小梅 Wei=小伟 Lan=小兰 Hua=小华 Fang=小芳 Jun=小军 Xue=小雪 Gang=小刚""".split()
)

ITEMS: dict[str, tuple[str, str, str, str]] = {}  # English singular -> class, plural, Chinese, measure word
for _line in """
toy: ball balls 皮球 个; kite kites 风筝 只; book books 书 本; hat hats 帽子 顶; drum drums 鼓 面; bell bells 铃铛 个; boat boats 小船 只;
  scarf scarves 围巾 条; cup cups 杯子 个; doll dolls 布娃娃 个; ring rings 戒指 枚; car cars 玩具车 辆; pen pens 钢笔 支; clock clocks 钟 座
food: apple apples 苹果 个; pear pears 梨 个; egg eggs 鸡蛋 个; cake cakes 蛋糕 块; fish fish 鱼 条; carrot carrots 胡萝卜 根; peach peaches 桃子 个;
  nut nuts 坚果 颗; plum plums 李子 颗; cookie cookies 饼干 块
stock: shell shells 贝壳 枚; stone stones 石头 块; leaf leaves 树叶 片; feather feathers 羽毛 根; flower flowers 花 朵; stick sticks 木棍 根;
  button buttons 纽扣 颗; bead beads 珠子 颗
plant: rose roses 玫瑰 株; tree trees 树 棵; bean beans 豆子 株; tulip tulips 郁金香 株; pumpkin pumpkins 南瓜 棵
coin: coin coins 硬币 枚
umbrella: umbrella umbrellas 雨伞 把
lamp: lamp lamps 灯 盏; candle candles 蜡烛 支
map: map maps 地图 张
""".strip().replace("\n  ", " ").split("\n"):
    _class, _, _entries = _line.partition(": ")
    for _entry in _entries.split(";"):
        _one, _many, _zh, _measure = _entry.split()
        ITEMS[_one] = (_class, _many, _zh, _measure)


def _pairs(text: str) -> dict[str, str]:
    return {en.strip(): zh.strip() for en, _, zh in (pair.partition("=") for pair in text.split(";"))}


PLACES = _pairs(
    "the garden=花园; the kitchen=厨房; the park=公园; the forest=森林; the library=图书馆; the barn=谷仓; the school=学校; the village=村子;"
    "the shop=商店; the cave=山洞; the market=市场; the yard=院子; the attic=阁楼; the tower=塔楼; the old house=老房子; the field=田野"
)
HOLDERS = _pairs(
    "the box=盒子; the basket=篮子; the bag=袋子; the drawer=抽屉; the cupboard=柜子; the chest=箱子; the pot=罐子; the bucket=水桶"
)
COLORS = _pairs("red=红色; blue=蓝色; green=绿色; yellow=黄色; white=白色; black=黑色; pink=粉色; brown=棕色")
ANIMALS = _pairs("dog=小狗; cat=小猫; bird=小鸟; rabbit=兔子; fox=狐狸; duck=鸭子; mouse=老鼠; frog=青蛙; goat=山羊; squirrel=松鼠")
NUMBERS_EN = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
NUMBERS_ZH = "零 一 两 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十".split()

# ---------------------------------------------------------------- stories

PLOT_TEXT = """
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

share: a b x=food n=m+k
{a} had {nx}. / One day, {a} came home with {nx}. || {a}有{nx}。 / 有一天，{a}带回家{nx}。
{b} was hungry and had none. / {b} had no {xs}. || {b}饿了，可是什么吃的也没有。 / {b}没有{x}。
{a} gave {b} {mx}. / "Take {mx}," said {a} to {b}. || {a}给了{b}{mx}。 / {a}对{b}说：“给你{mx}。”
? Now {a} had {kx} left. || 现在{a}还剩{kx}。
They sat down and ate together. || 他们坐下来一起吃。
? Food tastes better when it is shared. || 好东西要一起分享。
Q How many {xs} did {a} have at first? = {n} || {a}一开始有几{wx}？ = {nz}
Q How many {xs} did {b} get? = {m} || {b}得到了几{wx}？ = {mz}
Q How many {xs} does {a} have left? = {k} || {a}还剩几{wx}？ = {kz}

gather: a b x=stock n+m=k p h
{a} and {b} went to {p} to look for {xs}. || {a}和{b}去{p}找{x}。
{a} found {nx} and {b} found {mx}. || {a}找到了{nx}，{b}找到了{mx}。
? "Now we have {kx}!" said {a}. || {a}说：“现在我们有{kx}了！”
They put all the {xs} into {h}. || 他们把{x}都放进了{h}里。
? Many hands make light work. || 人多力量大。
Q How many {xs} did {a} find? = {n} || {a}找到了几{wx}？ = {nz}
Q How many {xs} did {b} find? = {m} || {b}找到了几{wx}？ = {mz}
Q How many {xs} do they have? = {k} || 他们一共有几{wx}？ = {kz}
Q Where are the {xs}? = {h} || {x}在哪里？ = {h}

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

trade: a b x=toy y=toy
{a} had {one_x} and {b} had {one_y}. || {a}有一{zx}，{b}有一{zy}。
"I like your {y}," said {a}. || {a}说：“我喜欢你的{y}。”
"And I like your {x}," said {b}. || {b}说：“我也喜欢你的{x}。”
So they traded. / So they changed the {x} for the {y}. || 于是他们交换了。 / 于是他们用{x}换了{y}。
? Both of them were happy. || 两个人都很高兴。
Q Who has the {x} now? = {b} || {x}现在在谁手里？ = {b}
Q Who has the {y} now? = {a} || {y}现在在谁手里？ = {a}
Q Who had the {x} at first? = {a} || {x}一开始在谁手里？ = {a}

market: a b x=toy y=coin n=m+k
{a} went to the market with {ny}. || {a}带着{ny}去了市场。
{a} bought {one_x} from {b} for {my}. || {a}花{my}向{b}买了一{zx}。
? {a} put {ky} back into the bag. || {a}把{ky}放回了袋子里。
"Thank you," said {b}. "Come again!" || {b}说：“谢谢，下次再来！”
Q How many coins does {a} have left? = {k} || {a}还剩几枚硬币？ = {kz}
Q How many coins did the {x} cost? = {m} || {x}花了几枚硬币？ = {mz}
Q Who sold the {x}? = {b} || 谁卖了{x}？ = {b}
Q What did {a} buy? = the {x} || {a}买了什么？ = {x}

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
"Come under my umbrella," said {a}. || {a}说：“到我的雨伞下面来吧。”
They walked to {p} and stayed dry. || 他们一起走到{p}，谁也没有淋湿。
Q Who had the umbrella? = {a} || 谁有雨伞？ = {a}
Q Where did they walk? = {p} || 他们走到了哪里？ = {p}
Q What colour is the umbrella? = {c} || 雨伞是什么颜色的？ = {c}

animal: a s p q x=food n
In {p}, {a} met a hungry {s}. || {a}在{p}里遇到了一{zs}，它很饿。
{a} gave it {nx}. || {a}给了它{nx}。
The {s} ate and followed {a} to {q}. || {s}吃完后，跟着{a}去了{q}。
? "Stay with me," said {a}. || {a}说：“留在我身边吧。”
? Be kind and you will find friends. || 善良的人会有朋友。
Q What animal did {a} meet? = the {s} || {a}遇到了什么动物？ = {s}
Q Where did {a} meet the {s}? = {p} || {a}是在哪里遇到{s}的？ = {p}
Q Where is the {s} now? = {q} || {s}现在在哪里？ = {q}
Q How many {xs} did the {s} get? = {n} || {s}得到了几{wx}？ = {nz}

plant: a b x=plant n+m=k p
In spring, {a} planted {nx} in {p}. || 春天，{a}在{p}里种了{nx}。
{b} came and planted {mx} more. || {b}也来种了{mx}。
? Soon {kx} stood in the sun. || 不久，{kx}在阳光下长大了。
"How pretty!" said {b}. || {b}说：“真好看！”
? Good things take time. || 好事需要耐心。
Q How many {xs} did {a} plant? = {n} || {a}种了几{wx}？ = {nz}
Q How many {xs} did {b} plant? = {m} || {b}种了几{wx}？ = {mz}
Q How many {xs} are there? = {k} || 一共有几{wx}？ = {kz}
Q Where are the {xs}? = {p} || {x}种在哪里？ = {p}

moved: a b x=toy h g
{a} put {one_x} into {h} and went out. || {a}把一{zx}放进{h}里，就出去了。
Then {b} moved the {x} to {g}. || 后来，{b}把{x}移到了{g}里。
{a} came back and looked in {h}. || {a}回来后，先去{h}里找。
? "I moved it," said {b}. "I am sorry." || {b}说：“是我移动了它，对不起。”
Q Where is the {x} now? = {g} || {x}现在在哪里？ = {g}
Q Where did {a} look? = {h} || {a}先去哪里找？ = {h}
Q Who moved the {x}? = {b} || 谁移动了{x}？ = {b}

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

treasure: a b x=map y=coin p q n=k+k
{a} found an old map in {p}. || {a}在{p}里找到了一张旧地图。
The map led {a} and {b} to {q}. || 地图把{a}和{b}带到了{q}。
There they dug up {ny}. || 他们在那里挖出了{ny}。
? Each of them got {ky}. || 他们每人分到{ky}。
Q Where was the map? = {p} || 地图是在哪里找到的？ = {p}
Q Where were the coins? = {q} || 硬币是在哪里挖出来的？ = {q}
Q How many coins did they find? = {n} || 他们挖出了几枚硬币？ = {nz}
Q How many coins did each of them get? = {k} || 他们每人分到几枚硬币？ = {kz}

borrow: a b d x=toy c
{a} lent {one_cx} to {b}. || {a}把一{zcx}借给了{b}。
{b} lent the {x} to {d}. || {b}又把{x}借给了{d}。
"Where is my {x}?" asked {a}. || {a}问：“我的{x}在哪里？”
"{d} has it now," said {b}. || {b}说：“现在在{d}那里。”
? Ask before you lend what is not yours. || 别人的东西不能随便借出去。
Q Who has the {x} now? = {d} || {x}现在在谁手里？ = {d}
Q Whose {x} is it? = {a} || {x}是谁的？ = {a}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}

bake: a b x=food n=m+k p
{a} was cooking and needed {nx}. || {a}要做饭，需要{nx}。
But there were only {mx} in the kitchen. || 可是厨房里只有{mx}。
So {b} ran to {p} and brought {kx}. || 于是{b}跑到{p}，拿来了{kx}。
"Now we can cook," said {a}. || {a}说：“现在可以做饭了。”
Q How many {xs} did {a} need? = {n} || {a}需要几{wx}？ = {nz}
Q How many {xs} did {b} bring? = {k} || {b}拿来了几{wx}？ = {kz}
Q Where did {b} go? = {p} || {b}跑到了哪里？ = {p}

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

dark: a b x=lamp c p
{a} was afraid of the dark in {p}. || {a}怕{p}里的黑暗。
{b} brought {one_cx}. || {b}拿来了一{zcx}。
"Keep it beside you," said {b}. || {b}说：“把它放在身边吧。”
{a} was not afraid any more. || {a}再也不害怕了。
Q Who was afraid? = {a} || 谁怕黑？ = {a}
Q Who brought the {x}? = {b} || {x}是谁拿来的？ = {b}
Q What colour is the {x}? = {c} || {x}是什么颜色的？ = {c}
Q Where was it dark? = {p} || 哪里很黑？ = {p}
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One sentence of a plot: its variants in each language, and whether a story may leave it out."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    optional: bool


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot: roles, lines, and questions as (question, answer) templates in each language."""

    name: str
    roles: tuple[str, ...]
    lines: tuple[Line, ...]
    questions: tuple[dict[str, tuple[str, str]], ...]


def read_plot(block: str) -> Plot:
    """One plot from its table: a head with roles, lines as "English || Chinese", variants behind " / ", questions with Q."""
    head, *rows = block.strip().split("\n")
    name, _, roles = head.partition(": ")
    lines, questions = [], []
    for row in rows:
        en, zh = (side.strip() for side in row.lstrip("?Q ").split("||"))
        if row.startswith("Q "):
            ask_en, _, answer_en = en.partition(" = ")
            ask_zh, _, answer_zh = zh.partition(" = ")
            questions.append({"en": (ask_en, answer_en), "zh": (ask_zh, answer_zh)})
        else:
            variants = tuple(en.split(" / ")), tuple(zh.split(" / "))
            lines.append(Line(en=variants[0], zh=variants[1], optional=row.startswith("?")))
    return Plot(name=name, roles=tuple(roles.split()), lines=tuple(lines), questions=tuple(questions))


PLOTS = {plot.name: plot for plot in map(read_plot, PLOT_TEXT.strip().split("\n\n"))}
ITEMS_OF = {c: [item for item, entry in ITEMS.items() if entry[0] == c] for c in dict.fromkeys(e[0] for e in ITEMS.values())}
POOLS = {
    "a": tuple(NAMES), "b": tuple(NAMES), "d": tuple(NAMES), "p": tuple(PLACES), "q": tuple(PLACES), "h": tuple(HOLDERS),
    "g": tuple(HOLDERS), "c": tuple(COLORS), "s": tuple(ANIMALS),
}  # fmt: skip


def plan_story(r: Dice) -> dict[str, Any]:
    """Draw a plot and fill its roles: the world that the story tells of, without words of any language."""
    plot = pick(r, tuple(PLOTS.values()))
    plan: dict[str, Any] = {"plot": plot.name}
    for role in plot.roles:
        letter, _, kind = role.partition("=")
        if letter in POOLS:
            value = pick(r, POOLS[letter])
            while value in plan.values():
                value = pick(r, POOLS[letter])
            plan[letter] = value
        elif letter in "xy":
            value = pick(r, ITEMS_OF[kind])
            while value in plan.values():
                value = pick(r, ITEMS_OF[kind])
            plan[letter] = value
        else:
            plan.update(draw_counts(r, role))
    return plan


def draw_counts(r: Dice, role: str) -> dict[str, int]:
    """Numbers for a role such as "n", "n=m+k" (total first), "n+m=k" (parts first) or "n=k+k", none above ten."""
    if role == "n":
        return {"n": 2 + int(r() * 7)}
    if role == "n=k+k":
        k = 1 + int(r() * 5)
        return {"n": 2 * k, "k": k}
    total = 3 + int(r() * 8)
    part = 1 + int(r() * (total - 1))
    return {"n": total, "m": part, "k": total - part} if role == "n=m+k" else {"n": part, "m": total - part, "k": total}


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def word_forms(plan: Mapping[str, Any], lang: str) -> dict[str, str]:
    """Every form that a template may ask for: names, items with article or measure word, counts, colours."""
    english = lang == "en"
    out: dict[str, str] = {}
    counts = [role for role in "nmk" if role in plan]
    for role in plan:
        value = plan[role]
        if role in "abd":
            out[role] = value if english else NAMES[value]
        elif role in "pq":
            out[role] = value if english else PLACES[value]
        elif role in "hg":
            out[role] = value if english else HOLDERS[value]
        elif role == "s":
            out["s"], out["zs"] = (value, "") if english else (ANIMALS[value], "只" + ANIMALS[value])
        elif role == "c":
            out["c"] = value if english else COLORS[value]
        elif role in "nmk":
            out[role] = NUMBERS_EN[value] if english else NUMBERS_ZH[value]
        elif role in "xy":
            _, many, zh, measure = ITEMS[value]
            colour = plan.get("c", "") if role == "x" else ""
            if english:
                out[role], out[role + "s"], out["one_" + role] = value, many, article(value)
                for count in counts:
                    out[count + role] = f"{NUMBERS_EN[plan[count]]} {value if plan[count] == 1 else many}"
                if colour:
                    out["one_cx"] = article(f"{colour} {value}")
            else:
                out[role], out["w" + role], out["z" + role] = zh, measure + zh, measure + zh
                for count in counts:
                    out[count + role] = NUMBERS_ZH[plan[count]] + measure + zh
                    out[count + "z"] = NUMBERS_ZH[plan[count]] + measure
                if colour:
                    out["zcx"] = f"{measure}{COLORS[colour]}的{zh}"
    return out


def tell(plan: Mapping[str, Any], lang: str, r: Dice, page: Page, n_questions: int = 0) -> None:
    """Write a plan as a story, followed by questions about its world."""
    plot, words = PLOTS[plan["plot"]], word_forms(plan, lang)
    sentences = [
        pick(r, line.en if lang == "en" else line.zh).format_map(words)
        for line in plot.lines
        if not line.optional or r() < 0.6
    ]
    page.write((" " if lang == "en" else "").join(sentences))
    for index in pick_some(r, range(len(plot.questions)), min(n_questions, len(plot.questions))):
        question, answer = plot.questions[index][lang]
        page.ask(lang, question.format_map(words), answer.format_map(words), f"{plot.name}.{index}")


# ---------------------------------------------------------------- facts

SYLLABLES = _pairs(
    "ka=卡; lo=洛; mi=米; ra=拉; to=托; ne=内; sa=萨; vi=维; do=多; ri=里; ma=玛; lu=卢; be=贝; no=诺; ta=塔; fi=菲; go=戈; su=苏; pa=帕; le=莱;"
    "mo=莫; zu=祖; de=德; ha=哈"
)
JOBS = _pairs(
    "doctor=医生; teacher=老师; baker=面包师; farmer=农民; painter=画家; singer=歌手; pilot=飞行员; cook=厨师; writer=作家; driver=司机;"
    "nurse=护士; judge=法官"
)
CITIES = _pairs(
    "Paris=巴黎; London=伦敦; Rome=罗马; Cairo=开罗; Beijing=北京; Tokyo=东京; Berlin=柏林; Madrid=马德里; Oslo=奥斯陆; Delhi=德里; Lima=利马;"
    "Shanghai=上海"
)
FOODS = _pairs("rice=米饭; bread=面包; soup=汤; noodles=面条; cheese=奶酪; fish=鱼; salad=沙拉; honey=蜂蜜; tofu=豆腐; beans=豆子")
HOBBIES = _pairs("chess=下棋; swimming=游泳; singing=唱歌; dancing=跳舞; reading=读书; fishing=钓鱼; running=跑步; drawing=画画; cooking=做饭; skiing=滑雪")
PETS = _pairs("dog=狗; cat=猫; bird=鸟; rabbit=兔子; fish=鱼; horse=马; duck=鸭子; goat=山羊; hen=母鸡; pig=猪")
ATTRIBUTES = {"year": None, "city": CITIES, "job": JOBS, "food": FOODS, "hobby": HOBBIES, "pet": PETS}
FACT_TEXT = """
year | {n} was born in {v}. / The birth year of {n} is {v}. | {n}出生于{v}年。 / {n}是{v}年出生的。 | When was {n} born? | {n}是哪一年出生的？
city | {n} lives in {v}. / The home of {n} is in {v}. | {n}住在{v}。 / {n}的家在{v}。 | Where does {n} live? | {n}住在哪里？
job | {n} works as a {v}. / The job of {n} is {v}. | {n}的职业是{v}。 / {n}是一名{v}。 | What is the job of {n}? | {n}的职业是什么？
food | {n} likes to eat {v}. / The favourite food of {n} is {v}. | {n}喜欢吃{v}。 / {n}最爱的食物是{v}。 | What does {n} like to eat? | {n}喜欢吃什么？
hobby | {n} enjoys {v}. / The hobby of {n} is {v}. | {n}喜欢{v}。 / {n}的爱好是{v}。 | What is the hobby of {n}? | {n}的爱好是什么？
pet | {n} has a pet {v}. / The pet of {n} is a {v}. | {n}养了一只{v}。 / {n}的宠物是{v}。 | What pet does {n} have? | {n}的宠物是什么？
"""
FACT_LINES = {
    name: {"en": en.split(" / "), "zh": zh.split(" / "), "ask_en": ask_en, "ask_zh": ask_zh}
    for name, en, zh, ask_en, ask_zh in (
        [part.strip() for part in row.split("|")] for row in FACT_TEXT.strip().split("\n")
    )
}
PET_MEASURE = {"马": "匹", "狗": "条", "鱼": "条", "猪": "头"}


@dataclass(frozen=True, kw_only=True)
class Person:
    """An invented person: the same facts under an English and a Chinese name."""

    index: int
    name: str
    name_zh: str
    facts: Mapping[str, str]
    langs: tuple[str, ...]
    questioned: bool

    def called(self, lang: str) -> str:
        return self.name if lang == "en" else self.name_zh

    def value(self, attribute: str, lang: str) -> str:
        table, value = ATTRIBUTES[attribute], self.facts[attribute]
        return value if table is None or lang == "en" else table[value]


@lru_cache(maxsize=8)
def invent_people(seed: int, n: int) -> tuple[Person, ...]:
    """`n` people with different names. Three in five are known in both languages, one in five in English or Chinese only.

    Half of each group are asked about in training (`questioned`); for the others only biographies are read.
    """
    syllables = list(SYLLABLES)
    n_names = len(syllables) ** 2
    if not 1 <= n <= n_names**2:
        raise ValueError(f"n_people={n} must be between 1 and {n_names**2}: so many different names can be made")
    r = dice(seed, "people")
    first, last = pick_some(r, range(n_names), n_names), pick_some(r, range(n_names), n_names)
    people = []
    for i in range(n):
        a, b = first[i % n_names], last[(i + i // n_names) % n_names]
        name = [[syllables[c // len(syllables)], syllables[c % len(syllables)]] for c in (a, b)]
        facts = {key: pick(r, tuple(table)) if table else str(1950 + int(r() * 50)) for key, table in ATTRIBUTES.items()}
        people.append(
            Person(
                index=i,
                name=" ".join("".join(part).capitalize() for part in name),
                name_zh="·".join("".join(SYLLABLES[s] for s in part) for part in name),
                facts=facts,
                langs={3: ("en",), 4: ("zh",)}.get(i % 5, ("en", "zh")),
                questioned=i // 5 % 2 == 0,
            )
        )
    return tuple(people)


@lru_cache(maxsize=64)
def people_for(seed: int, n: int, lang: str, questioned: bool | None) -> tuple[Person, ...]:
    """The people known in a language, and of these those whom training asks about (True), or does not (False)."""
    return tuple(
        p for p in invent_people(seed, n) if lang in p.langs and (questioned is None or p.questioned == questioned)
    )


def fact_sentence(person: Person, attribute: str, lang: str, r: Dice) -> str:
    value = person.value(attribute, lang)
    text = pick(r, FACT_LINES[attribute][lang]).format(n=person.called(lang), v=value)
    if attribute == "pet" and lang == "zh":
        text = text.replace("一只", "一" + PET_MEASURE.get(value, "只"))
    return text.replace("a a", "an a")


# ---------------------------------------------------------------- the configuration

@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of. The shares need not add up to one; a part with share 0 does not appear."""

    seed: int = 0
    n_people: int = 40
    chinese: float = 0.5
    stories: float = 0.50
    facts: float = 0.25
    arithmetic: float = 0.25
    reasoning: float = 0.0
    knowledge: float = 0.0
    length: float = 0.0
    dialogue: float = 0.0
    preference: float = 0.0
    max_digits: int = 3
    max_length: int = 16
    defects: float = 0.0

    def __post_init__(self) -> None:
        for name in (*PARTS, "chinese", "defects"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be a share between 0 and 1")
        if not any(self.shares.values()):
            raise ValueError("every part has share 0: set at least one of " + ", ".join(PARTS))
        for name in ("n_people", "max_digits", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def shares(self) -> dict[str, float]:
        """Share of each part, normalised."""
        total = sum(getattr(self, part) for part in PARTS) or 1
        return {part: getattr(self, part) / total for part in PARTS}


PARTS = ("stories", "facts", "arithmetic", "reasoning", "knowledge", "length", "dialogue", "preference")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a writer is asked for: the corpus, the dice, the language, the split, and a length if one is wanted."""

    config: CorpusConfig
    r: Dice
    lang: str
    split: str
    length: int | None = None


Draft = tuple[Page, str, dict[str, Any]]  # the page, its language, its truth


def write_story(task: Task) -> Draft:
    """A story with two or three questions about it."""
    plan = plan_story(task.r)
    while split_of(plan) != task.split:
        plan = plan_story(task.r)
    page = Page()
    tell(plan, task.lang, task.r, page, n_questions=2 + (task.r() < 0.5))
    return page, task.lang, {"plan": plan}


def write_biography(task: Task) -> Draft:
    """All facts of one person, in random order and words."""
    person = pick(task.r, people_for(task.config.seed, task.config.n_people, task.lang, None))
    page = Page()
    order = pick_some(task.r, tuple(ATTRIBUTES), len(ATTRIBUTES))
    page.write((" " if task.lang == "en" else "").join(fact_sentence(person, a, task.lang, task.r) for a in order))
    return page, task.lang, {"people": [person.index]}


def write_recall(task: Task) -> Draft:
    """Four questions about facts of people; held out: about those whom training never asks about."""
    people = people_for(task.config.seed, task.config.n_people, task.lang, task.split == "train")
    page, asked = Page(), []
    for _ in range(4):
        person, attribute = pick(task.r, people), pick(task.r, tuple(ATTRIBUTES))
        question = FACT_LINES[attribute]["ask_" + task.lang].format(n=person.called(task.lang))
        page.ask(task.lang, question, person.value(attribute, task.lang), f"{person.index}.{attribute}")
        asked.append(person.index)
    return page, task.lang, {"people": asked}


def draw_operands(task: Task, op: str) -> tuple[int, int]:
    """Two operands of one length whose pair belongs to the split; for a difference the larger first."""
    while True:
        digits = task.length or 1 + int(task.r() * task.config.max_digits)
        a, b = int(task.r() * 10**digits), int(task.r() * 10**digits)
        if op == "-" and a < b:
            a, b = b, a
        # The order does not matter to the meaning of a sum: a+b held out must not be read as b+a.
        meaning = (op, *sorted((a, b))) if op == "+" else (op, a, b)
        if split_of(*meaning) == task.split:
            return a, b


def scratchpad(a: int, b: int, op: str) -> str:
    """Column arithmetic in words of digits, units first: `47+85` is `7+5=12,4+8+1=13`."""
    steps, carry, width = [], 0, max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        if op == "+":
            steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={x + y + carry}")
            carry = int(x + y + carry > 9)
        else:
            borrow = int(x - y - carry < 0)
            steps.append(f"{x + 10 * borrow}-{y}" + ("-1" if carry else "") + f"={x + 10 * borrow - y - carry}")
            carry = borrow
    return ",".join(steps)


def write_sums(task: Task, form: str, n_lines: int = 3) -> Draft:
    """Sums or differences, one a line: with a scratchpad, plain, or with the digits of the result reversed (~)."""
    page, pairs = Page(), []
    for i in range(n_lines):
        op = "+" if task.r() < 0.6 else "-"
        a, b = draw_operands(task, op)
        result = a + b if op == "+" else a - b
        page.write(("\n" if i else "") + f"{a}{op}{b}=")
        work = {"scratchpad": f"[{scratchpad(a, b, op)}]{result}", "plain": str(result), "reversed": "~" + str(result)[::-1]}
        page.answer(work[form], form + op)
        pairs.append([a, op, b])
    return page, "und", {"sums": pairs, "form": form}


WRITERS: dict[str, list[tuple[float, str, Callable[[Task], Draft]]]] = {
    "stories": [(1.0, "story", write_story)],
    "facts": [(0.6, "biography", write_biography), (0.4, "recall", write_recall)],
    "arithmetic": [
        (0.85, "scratchpad", lambda task: write_sums(task, "scratchpad")),
        (0.10, "plain", lambda task: write_sums(task, "plain")),
        (0.05, "reversed", lambda task: write_sums(task, "reversed")),
    ],
}


def _choose(r: Dice, weighted: Sequence[tuple[float, Any]]) -> Any:
    total = sum(w for w, _ in weighted)
    x = r() * total
    for w, value in weighted:
        x -= w
        if x < 0:
            return value
    return weighted[-1][1]


def write_document(task: Task, kind: str) -> Document:
    """Write one document of a part ("stories") or of one of its tasks ("facts.recall")."""
    part, _, name = kind.partition(".")
    if part not in WRITERS or (name and name not in [n for _, n, _ in WRITERS[part]]):
        known = ", ".join(f"{p}.{n}" for p in WRITERS for _, n, _ in WRITERS[p])
        raise ValueError(f"no kind {kind!r}: write a part, or one of {known}")
    entries = [(w, (n, f)) for w, n, f in WRITERS[part] if (not name or n == name)]
    if part == "facts" and task.split == "heldout":
        entries = [(1.0, ("recall", write_recall))]
    name, writer = _choose(task.r, entries)
    page, lang, meta = writer(task)
    return Document(page.text, lang, part, task.split, {"task": name, "answers": page.answers, **meta})


def document(config: CorpusConfig, index: int, *, split: str = "train") -> Document:
    """The document with a given number: a function of the configuration and the number, and of nothing else."""
    r = dice(config.seed, split, index)
    part = _choose(r, [(share, part) for part, share in config.shares.items() if share])
    lang = "zh" if r() < config.chinese else "en"
    return write_document(Task(config=config, r=r, lang=lang, split=split), part)


def generate(config: CorpusConfig, *, n_documents: int | None = None, split: str = "train") -> Iterator[Document]:
    """Documents 0, 1, 2, … of a corpus, without end or the first `n_documents`."""
    for index in itertools.count() if n_documents is None else range(n_documents):
        yield document(config, index, split=split)


def questions(
    config: CorpusConfig, kind: str, lang: str, split: str, n: int, *, length: int | None = None
) -> list[Question]:
    """At most `n` different questions: documents of a kind, cut off before their first answer."""
    found: dict[str, Question] = {}
    for index in range(50 * n + 1000):
        if len(found) >= n:
            break
        r = dice(config.seed, "question", kind, lang, split, length, index)
        doc = write_document(Task(config=config, r=r, lang=lang, split=split, length=length), kind)
        if not doc.meta["answers"]:
            continue
        start, end, label = doc.meta["answers"][0]
        target = doc.text[start:end]
        meta = {**doc.meta, "label": label, "target": target}
        found.setdefault(doc.text[:start], Question(doc.text[:start], extract_answer(target), kind, doc.lang, meta))
    return list(found.values())
