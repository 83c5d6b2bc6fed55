"""What the pictures show: everyday things by their plain name, and under which names drawing sets have them.

A line of ``_TABLE`` is a category and its nouns; ``noun=icon|icon`` where the sets' icon has another name than the noun
(spaces become hyphens).
"""

from __future__ import annotations

from dataclasses import dataclass

_TABLE = """
animal: dog, cat, mouse, rabbit, fox, bear, panda, koala, tiger, lion, cow, pig, frog, monkey, chicken, penguin,
  bird=bird|blackbird, duck, eagle, owl, bat, wolf, horse, zebra, deer, sheep=ewe, goat, camel, giraffe, elephant,
  rhinoceros, hippopotamus, crocodile, turtle, lizard, snake, dragon, whale=spouting-whale|whale, dolphin,
  fish=tropical-fish|fish, shark, octopus, crab, snail, butterfly, bee=honeybee, ant, beetle=lady-beetle,
  spider, kangaroo, hedgehog, parrot, peacock, flamingo, swan, gorilla, unicorn, turkey
food: apple=red-apple, pear, orange=tangerine, lemon, banana, watermelon, grapes, strawberry, cherries, peach,
  pineapple, coconut, tomato, eggplant, carrot, corn=ear-of-corn, potato, mushroom, bread, cheese=cheese-wedge,
  hamburger, pizza, taco, sandwich, egg=egg|cooking, cookie, cake=birthday-cake, pie, donut=doughnut, ice cream,
  chocolate=chocolate-bar, candy, popcorn, croissant, pretzel, pancakes, avocado, broccoli, onion, honey=honey-pot
vehicle: car=automobile, taxi, bus, truck=delivery-truck, tractor, train=locomotive, bicycle, motorcycle, airplane,
  helicopter, rocket, boat=sailboat, ship=passenger-ship|ship, ambulance, fire engine, scooter=kick-scooter, canoe
clothing: shirt=t-shirt, jeans, dress, shoe=running-shoe, boot=womans-boot, sandal=womans-sandal, hat=top-hat,
  cap=billed-cap, crown, glasses, scarf, gloves, socks, coat, necktie=necktie, ring, backpack, purse=handbag
instrument: guitar, piano=musical-keyboard, violin, trumpet, drum, saxophone, accordion, banjo
plant: tree=deciduous-tree, palm tree, cactus, rose, sunflower, tulip, pine=evergreen-tree
tool: hammer, axe, wrench, scissors, key, lock=locked, saw=carpentry-saw, ladder, magnet, microscope, telescope,
  pencil, paintbrush, knife=kitchen-knife, spoon, broom
furniture: chair, bed, couch=couch-and-lamp, toilet, bathtub, door
thing: book=closed-book, clock=alarm-clock|mantelpiece-clock, watch, phone=mobile-phone, computer=laptop, camera,
  television, radio, lamp=light-bulb, candle, umbrella=umbrella|umbrella-with-rain-drops, balloon,
  gift=wrapped-gift, bell, trophy, basket, envelope, newspaper, anchor, bomb, robot, ghost, kite,
  ball=soccer-ball, basketball, football=american-football, cup=teacup-without-handle|hot-beverage, bottle=baby-bottle,
  tent, house, castle, sun, moon=crescent-moon, star, heart=red-heart, snowman=snowman-without-snow|snowman,
  globe=globe-showing-americas, dice=game-die, teddy bear, battery, skateboard, sled, pill
"""


@dataclass(frozen=True)
class Noun:
    """A thing: its name, the category it belongs to, and the names of its icon, the first that a set has."""

    name: str
    category: str
    icons: tuple[str, ...]

    @property
    def plural(self) -> str:
        """For counting."""
        if self.name in _PLURALS:
            return _PLURALS[self.name]
        if self.name.endswith(("s", "sh", "ch", "x")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"

    @property
    def is_plural(self) -> bool:
        """Whether one of them is spoken of as several: jeans, scissors."""
        return self.name in _ALWAYS_PLURAL

    @property
    def verb(self) -> str:
        """``is`` or ``are``, of one of them."""
        return "are" if self.is_plural else "is"

    @property
    def with_article(self) -> str:
        """As a sentence names one of them."""
        if self.name in _NO_ARTICLE:
            return self.name
        return ("an " if self.name[0] in "aeiou" and self.name != "unicorn" else "a ") + self.name


_PLURALS = {
    **{name: name for name in ("fish", "sheep", "deer", "dice", "corn", "broccoli", "bread", "honey", "popcorn")},
    **{name: name for name in ("jeans", "glasses", "scissors", "gloves", "socks", "grapes", "cherries", "pancakes")},
    **{"mouse": "mice", "wolf": "wolves", "knife": "knives", "tomato": "tomatoes", "potato": "potatoes"},
    **{"scarf": "scarves", "person": "people", "cheese": "cheeses", "candy": "candies"},
}
_ALWAYS_PLURAL = frozenset("jeans glasses scissors gloves socks grapes cherries pancakes dice".split())  # noqa: SIM905
_NO_ARTICLE = _ALWAYS_PLURAL | frozenset("corn broccoli bread honey popcorn cheese".split())  # noqa: SIM905


def _read(table: str) -> dict[str, Noun]:
    nouns: dict[str, Noun] = {}
    for line in table.replace("\n  ", " ").strip().splitlines():
        category, _, entries = line.partition(":")
        for entry in entries.split(","):
            name, _, icons = entry.strip().partition("=")
            nouns[name] = Noun(name, category, tuple((icons or name).replace(" ", "-").split("|")))
    return nouns


NOUNS: dict[str, Noun] = _read(_TABLE)
"""Every noun by its name."""

CATEGORIES = tuple(dict.fromkeys(noun.category for noun in NOUNS.values()))

NEVER_TOGETHER = frozenset(
    "dog cat apple banana car bus hat shoe guitar tree hammer key chair book clock ball umbrella star fish "  # noqa: SIM905
    "house".split()
)
"""Twenty nouns of which no two share a training picture: their pairings are held out."""
