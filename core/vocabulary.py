"""Names of concepts that a model can be expected to draw: what automatic preservation chooses from (`neighbours`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Concepts by kind; either list may be empty."""

    instances: tuple[str, ...] = ()
    """Nouns: "rooster", "coffee cup"."""
    styles: tuple[str, ...] = ()
    """What follows "in the style of"."""


_ANIMALS = (
    "cat, kitten, dog, puppy, horse, donkey, cow, sheep, goat, pig, lion, tiger, leopard, cheetah, lynx, wolf, fox, "
    "coyote, bear, polar bear, panda, koala, kangaroo, elephant, rhinoceros, hippopotamus, giraffe, zebra, camel, "
    "llama, deer, moose, bison, monkey, gorilla, chimpanzee, rabbit, squirrel, mouse, hamster, hedgehog, raccoon, "
    "beaver, otter, skunk, bat, fish, goldfish, clownfish, shark, dolphin, whale, seal, octopus, jellyfish, crab, "
    "lobster, seahorse, starfish, bird, rooster, chicken, duck, goose, swan, turkey, owl, eagle, hawk, parrot, "
    "penguin, pigeon, crow, sparrow, flamingo, peacock, ostrich, snake, lizard, crocodile, turtle, frog, dinosaur, "
    "dragon, unicorn, butterfly, bee, ant, spider, beetle, ladybug, dragonfly, snail"
)
_PEOPLE = (
    "man, woman, boy, girl, baby, child, old man, old woman, king, queen, knight, soldier, doctor, nurse, chef, "
    "farmer, police officer, firefighter, teacher, dancer, musician, clown, astronaut, robot, android, superhero, "
    "wizard, witch, pirate, fairy, ghost, zombie, alien, monster, statue, doll, puppet, teddy bear, cartoon "
    "character, snowman"
)
_THINGS = (
    "car, sports car, taxi, truck, bus, train, tram, bicycle, motorcycle, scooter, airplane, helicopter, rocket, "
    "spaceship, boat, sailboat, ship, submarine, tank, tractor, house, castle, church, tower, skyscraper, bridge, "
    "lighthouse, windmill, barn, tent, road, street, city, village, chair, table, sofa, bed, desk, lamp, clock, "
    "mirror, vase, book, newspaper, pen, umbrella, backpack, suitcase, hat, shoe, dress, shirt, glasses, watch, ring, "
    "crown, ball, kite, guitar, piano, violin, trumpet, drum, camera, phone, computer, television, bottle, cup, mug, "
    "bowl, knife, sword, shield, key, candle, balloon, flag, coin"
)
_FOOD_AND_NATURE = (
    "apple, banana, orange, lemon, strawberry, cherry, grapes, pineapple, watermelon, tomato, carrot, potato, onion, "
    "mushroom, bread, cheese, egg, pizza, hamburger, hot dog, sandwich, cake, cupcake, cookie, ice cream, chocolate, "
    "coffee, tea, wine, flower, rose, tulip, sunflower, daisy, lily, orchid, tree, palm tree, pine tree, cactus, "
    "leaf, grass, forest, mountain, volcano, river, lake, waterfall, beach, ocean, desert, island, cave, cloud, "
    "rainbow, sun, moon, star, planet, snow, fire"
)
_STYLES = (
    "Leonardo da Vinci, Michelangelo, Raphael, Caravaggio, Rembrandt, Johannes Vermeer, Albrecht Dürer, Hieronymus "
    "Bosch, Pieter Bruegel, Francisco Goya, William Turner, John Constable, Caspar David Friedrich, Edouard Manet, "
    "Claude Monet, Edgar Degas, Pierre-Auguste Renoir, Camille Pissarro, Paul Cézanne, Georges Seurat, Paul Gauguin, "
    "Vincent van Gogh, Henri de Toulouse-Lautrec, Edvard Munch, Gustav Klimt, Egon Schiele, Alphonse Mucha, Henri "
    "Matisse, Pablo Picasso, Georges Braque, Wassily Kandinsky, Paul Klee, Marc Chagall, Amedeo Modigliani, Piet "
    "Mondrian, Kazimir Malevich, Salvador Dali, René Magritte, Joan Miró, Frida Kahlo, Edward Hopper, Georgia "
    "O'Keeffe, Jackson Pollock, Andy Warhol, Roy Lichtenstein, Katsushika Hokusai, Utagawa Hiroshige, Norman "
    "Rockwell, Greg Rutkowski, Thomas Kinkade, Studio Ghibli, Pixar"
)


def _listed(*texts: str) -> tuple[str, ...]:
    return tuple(name for text in texts for name in text.split(", "))


COMMON = Vocabulary(_listed(_ANIMALS, _PEOPLE, _THINGS, _FOOD_AND_NATURE), _listed(_STYLES))
"""For models that were trained on everyday captions, and say nothing of what they know."""
