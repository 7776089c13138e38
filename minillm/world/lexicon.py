"""The words of the world: people, places, things, in two languages."""

from dataclasses import dataclass


def pairs(text: str) -> dict[str, str]:
    """A table of English to Chinese from "red=红色; blue=蓝色"."""
    return {
        en.strip(): zh.strip()
        for en, _, zh in (pair.partition("=") for pair in text.strip(" ;\n").split(";"))
    }


NAMES = pairs(
    "Tom=汤姆; Anna=安娜; Ben=本杰; Lily=莉莉; Sam=山姆; Mia=米娅; Jack=杰克; Lucy=露西; Max=马克; Amy=艾米; Leo=里奥; Ella=埃拉;"
    "Tim=蒂姆; Rose=罗丝; Bob=鲍勃; Sara=萨拉; Dan=丹尼; Kate=凯特; Peter=彼得; Nora=诺拉; Eric=埃里克; Emma=爱玛; Mike=迈克;"
    "Ruby=露比; Paul=保罗; Alice=爱丽丝; Ming=小明; Hong=小红; Mei=小梅; Wei=小伟; Lan=小兰; Hua=小华; Fang=小芳; Jun=小军;"
    "Xue=小雪; Gang=小刚"
)

PLACES = pairs(
    "the garden=花园; the kitchen=厨房; the park=公园; the forest=森林; the library=图书馆; the barn=谷仓; the school=学校;"
    "the village=村子; the shop=商店; the cave=山洞; the market=市场; the yard=院子; the attic=阁楼; the tower=塔楼;"
    "the old house=老房子; the field=田野"
)

HOLDERS = pairs(
    "the box=盒子; the basket=篮子; the bag=袋子; the drawer=抽屉; the cupboard=柜子; the chest=箱子; the pot=罐子; the bucket=水桶"
)

COLORS = pairs("red=红色; blue=蓝色; green=绿色; yellow=黄色; white=白色; black=黑色; pink=粉色; brown=棕色")

ANIMALS = pairs(
    "dog=小狗; cat=小猫; bird=小鸟; rabbit=兔子; fox=狐狸; duck=鸭子; mouse=老鼠; frog=青蛙; goat=山羊; squirrel=松鼠"
)

COUNTING = pairs(
    "zero=零; one=一; two=两; three=三; four=四; five=五; six=六; seven=七; eight=八; nine=九; ten=十; eleven=十一; twelve=十二;"
    "thirteen=十三; fourteen=十四; fifteen=十五; sixteen=十六; seventeen=十七; eighteen=十八; nineteen=十九; twenty=二十"
)

NUMBERS = {"en": list(COUNTING), "zh": list(COUNTING.values())}


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing that can be counted: plural, Chinese, measure word, and the class of things it belongs to."""

    one: str
    many: str
    zh: str
    measure: str
    family: str


ITEM_TEXT = """
toy: ball balls 皮球 个; kite kites 风筝 只; book books 书 本; hat hats 帽子 顶; drum drums 鼓 面; bell bells 铃铛 个;
  boat boats 小船 只; scarf scarves 围巾 条; cup cups 杯子 个; doll dolls 布娃娃 个; ring rings 戒指 枚;
  car cars 玩具车 辆; pen pens 钢笔 支; watch watches 手表 块
food: apple apples 苹果 个; pear pears 梨 个; egg eggs 鸡蛋 个; cake cakes 蛋糕 块; fish fish 鱼 条; nut nuts 坚果 颗;
  carrot carrots 胡萝卜 根; peach peaches 桃子 个; plum plums 李子 颗; cookie cookies 饼干 块
stock: shell shells 贝壳 枚; stone stones 石头 块; leaf leaves 树叶 片; feather feathers 羽毛 根; flower flowers 花 朵;
  stick sticks 木棍 根; button buttons 纽扣 颗; bead beads 珠子 颗
plant: rose roses 玫瑰 株; tree trees 树 棵; bean beans 豆子 株; tulip tulips 郁金香 株; pumpkin pumpkins 南瓜 棵
lamp: lamp lamps 灯 盏; candle candles 蜡烛 支
coin: coin coins 硬币 枚
umbrella: umbrella umbrellas 雨伞 把
map: map maps 地图 张
"""

ITEMS = {
    entry.split()[0]: Noun(*entry.split(), family)  # type: ignore[arg-type]
    for family, _, entries in (
        line.partition(": ") for line in ITEM_TEXT.strip().replace("\n  ", "").split("\n")
    )
    for entry in entries.strip("; ").split(";")
}

FAMILIES = {
    family: tuple(item for item, noun in ITEMS.items() if noun.family == family)
    for family in dict.fromkeys(noun.family for noun in ITEMS.values())
}


def article(noun: str) -> str:
    """`noun` with its indefinite article: "an apple", "a red kite"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def count_phrase(n: int, item: str, lang: str) -> str:
    """A number of things: "three kites", "三只风筝". Chinese counts with the noun's measure word."""
    noun = ITEMS[item]
    if lang == "en":
        return f"{NUMBERS['en'][n]} {noun.one if n == 1 else noun.many}"
    return NUMBERS["zh"][n] + noun.measure + noun.zh


SYLLABLES = pairs(
    "ka=卡; lo=洛; mi=米; ra=拉; to=托; ne=内; sa=萨; vi=维; do=多; ri=里; ma=玛; lu=卢; be=贝; no=诺; ta=塔; fi=菲; go=戈; su=苏;"
    "pa=帕; le=莱; mo=莫; zu=祖; de=德; ha=哈"
)

CITIES = pairs(
    "Paris=巴黎; London=伦敦; Rome=罗马; Cairo=开罗; Beijing=北京; Tokyo=东京; Berlin=柏林; Madrid=马德里; Oslo=奥斯陆; Delhi=德里;"
    "Lima=利马; Shanghai=上海"
)

JOBS = pairs(
    "doctor=医生; teacher=老师; baker=面包师; farmer=农民; painter=画家; singer=歌手; pilot=飞行员; cook=厨师; writer=作家;"
    "driver=司机; nurse=护士; judge=法官"
)

FOODS = pairs(
    "rice=米饭; bread=面包; soup=汤; noodles=面条; cheese=奶酪; fish=鱼; salad=沙拉; honey=蜂蜜; tofu=豆腐; beans=豆子"
)

HOBBIES = pairs(
    "chess=下棋; swimming=游泳; singing=唱歌; dancing=跳舞; reading=读书; fishing=钓鱼; running=跑步; drawing=画画;"
    "cooking=做饭; skiing=滑雪"
)

PETS = pairs(
    "dog=狗; cat=猫; bird=鸟; rabbit=兔子; fish=鱼; horse=马; duck=鸭子; goat=山羊; hen=母鸡; pig=猪"
)

PET_MEASURES = {"dog": "条", "fish": "条", "horse": "匹", "pig": "头"}  # the others: 只

ATTRIBUTES: dict[str, dict[str, str]] = {
    "year": {str(year): str(year) for year in range(1950, 2000)},
    "city": CITIES,
    "job": JOBS,
    "food": FOODS,
    "hobby": HOBBIES,
    "pet": PETS,
}
