"""The language that the embedded tokenizer is trained on: the tabletop's own, and English of robots and questions."""

import itertools

from openpi_ar.worlds.tabletop.tasks import known_prompts, known_subtasks

TABLETOP_WEIGHT = 40
"""How often the tabletop's subtasks and rare prompts are repeated, so that their every word becomes one piece."""

_THINGS = (
    "cup", "mug", "bowl", "plate", "bottle", "can", "spoon", "fork", "knife", "pan", "pot", "lid", "kettle", "towel", "cloth", "sponge",
    "napkin", "shirt", "sock", "blanket", "pillow", "book", "pen", "marker", "box", "bag", "basket", "tray", "drawer", "door", "cabinet",
    "microwave", "oven", "stove", "fridge", "sink", "dishwasher", "table", "counter", "shelf", "rack", "bin", "trash can", "chair",
    "apple", "banana", "orange", "lemon", "carrot", "tomato", "egg", "bread", "cheese", "butter", "salt shaker", "soup can",
    "milk carton", "cereal box", "ketchup", "chocolate pudding", "wine bottle", "coffee machine", "moka pot", "cream cheese",
    "alphabet soup", "salad dressing", "cube", "block", "ball", "ring", "peg", "cylinder", "screwdriver", "hammer", "cable", "plug",
    "switch", "button", "handle", "lever", "toy car", "puzzle piece", "remote", "phone", "laptop", "keyboard", "lamp", "plant",
)  # fmt: skip
_COLORS = ("red", "yellow", "green", "blue", "purple", "orange", "black", "white", "grey", "brown", "pink")
_ACTIONS = (
    "pick up the {a}", "put the {a} on the {b}", "put the {a} in the {b}", "place the {a} into the {b}", "move the {a} to the {b}",
    "push the {a} towards the {b}", "pull the {a} away from the {b}", "open the {a}", "close the {a}", "turn on the {a}",
    "turn off the {a}", "grasp the {a}", "lift the {a}", "release the {a}", "hand me the {a}", "wipe the {a} with the {b}",
    "fold the {a}", "stack the {a} on top of the {b}", "insert the {a} into the {b}", "rotate the {a}", "slide the {a} next to the {b}",
    "reach for the {a}", "pour from the {a} into the {b}", "take the {a} out of the {b}", "put both the {a} and the {b} in the basket",
    "clean up the {a}", "find the {a}", "point at the {a}", "carry the {a} to the {b}", "go to the {a}", "put away the {a}",
)  # fmt: skip
_QUESTIONS = (
    "what color is the {a}?", "where is the {a}?", "is the {a} on the {b}?", "is the {a} open or closed?", "how many objects are there?",
    "is there a {a} in the image?", "what is on the {a}?", "what is the robot holding?", "which object is closest to the {a}?",
    "what should the robot do next?", "is the {a} left or right of the {b}?", "has the task been completed?", "did the robot succeed?",
    "what is the gripper doing?", "describe the scene.", "what is in front of the {a}?", "what is behind the {b}?", "why did it fail?",
    "how many blocks are in the left bin?", "which block is nearest to the gripper?", "is the gripper open?", "which bins are empty?",
)  # fmt: skip
_ANSWERS = (
    "yes", "no", "the {a} is on the {b}", "the {a} is in the {b}", "there are two objects", "there is a {a} and a {b}", "nothing",
    "the robot is holding the {a}", "the {a} is left of the {b}", "it is {c}", "the {c} block", "not yet", "one", "two", "three", "four",
    "the gripper is empty", "the task is done", "between the {a} and the {b}", "I do not know", "in the left bin", "in the right bin", "in the middle bin",
)  # fmt: skip
_PHRASES = (
    "clean the kitchen", "make the bed", "set the table", "do the dishes", "do the laundry", "bus the table", "tidy up the living room",
    "make a sandwich", "make coffee", "pack the groceries", "sort the objects by color", "sort the objects by size",
    "put everything away", "throw away the trash", "move the gripper up", "move the gripper down", "move the arm to the left",
    "move the arm to the right", "move forward 10 cm", "move backward 5 cm", "open the gripper", "close the gripper", "go home", "stop",
    "wait", "start", "continue", "try again", "return to the home position", "rotate the wrist by 90 degrees", "be careful",
    "use your left arm", "use your right arm", "use both hands", "first pick up the cup, then put it on the plate",
    "after that, close the drawer", "before you start, open the door", "this one", "that one", "the other one", "the big one",
    "the small one", "the first one", "the second one", "the last one", "the top drawer of the cabinet", "the middle drawer",
    "the bottom drawer", "the front of the stove", "the back compartment of the caddy", "the edge of the table", "the upper left corner",
    "between the plate and the bowl", "on top of the cabinet", "under the shelf", "inside the basket", "next to the ramekin",
    "align the gripper with the handle", "approach the object from above", "lower the gripper", "raise the arm", "transfer the object",
    "hold it steady", "let go", "turn it upside down", "press the button", "flip the switch", "untangle the cable", "plug it in",
    "unplug it", "screw it in", "unscrew the cap", "shake the bottle", "stir the soup", "cut the bread", "peel the banana",
    "answer en what is this?", "detect cup", "segment plate", "caption en", "describe en", "failure detected, retrying", "Pick up the cup.",
    "Put the plate on the rack.", "Clean the table.", "Open the drawer.", "Move to the left.", "Task completed.", "Please", "Thank you",
    "The quick brown fox jumps over the lazy dog", "PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS", "!?.,:;'\"()[]{}<>-+=*/\\%&#@$^~`|_",
)  # fmt: skip


def sentences() -> list[str]:
    """The training corpus, the same list every time. Most begin with a space, as words inside a prompt do."""
    prompts = known_prompts()
    rare = tuple(prompt for prompt in prompts if ", then" not in prompt)  # the pairs are many, the other kinds nine
    lines = [*prompts, *(known_subtasks() * TABLETOP_WEIGHT), *(rare * TABLETOP_WEIGHT)]
    # Neighbours in the list are paired up: every thing occurs in every place without writing out all pairs.
    colored = zip(_THINGS, itertools.cycle(_COLORS), strict=False)
    things = [f"{color} {thing}" if i % 3 == 0 else thing for i, (thing, color) in enumerate(colored)]
    pairs = list(zip(things, [*things[7:], *things[:7]], itertools.cycle(_COLORS), strict=False))
    for i, pattern in enumerate((*_ACTIONS, *_QUESTIONS, *_ANSWERS)):
        lines += [pattern.format(a=a, b=b, c=c) for a, b, c in pairs[i % 8 :: 8]]
    lines += _PHRASES * 4
    return [f" {line}" for line in lines] + list(_PHRASES)
